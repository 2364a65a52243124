"""One training of a suite task: the plain loop, with Esper's lines in it where growth is asked for."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

import esper
from benchmarks.data import Split, stream
from benchmarks.flops import STEP, forward_flops, parameters
from benchmarks.suite_tasks import Batch, Schedule, Size, SuiteTask
from esper.contracts import Event

TOLD = (
    "widened",
    "grafted",
    "deepened",
    "reopened",
    "restored",
    "gate",
    "warning",
)  # kept of growth's events


@dataclass(frozen=True)
class Run:
    """One training's figures; ``probe`` and ``test`` are the task's metric: accuracy, or the loss."""

    task: str
    seed: int
    rate: float
    schedule: str
    steps: int
    size: Size | None  # at the end; None: it has parts that the task cannot rebuild from counts
    parameters: int
    probe: float
    probe_loss: float
    test: float
    test_loss: float
    training_flops: int
    growth_flops: int
    seconds: float  # wall time of training and growth; what is measured here for the curve is left out
    cpu_seconds: float
    growths: int  # changes of shape
    grew: tuple[Mapping[str, Any], ...] = ()  # what growth told, see TOLD
    curve: tuple[tuple[int, int, float], ...] = field(default=(), repr=False)  # FLOPs, parameters, test

    @property
    def flops(self) -> int:
        return self.training_flops + self.growth_flops

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Clock:
    """Wall and CPU seconds of what it is asked to time; other threads of the process count as CPU."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]


class Training:
    """A run that can be advanced step by step."""

    def __init__(
        self,
        task: SuiteTask,
        net: nn.Module,
        seed: int,
        rate: float,
        schedule: Schedule = "constant",
        grow: Mapping[str, Any] | None = None,
        steps: int | None = None,
    ) -> None:
        self.task, self.net, self.seed, self.rate, self.schedule = task, net, seed, rate, schedule
        self.steps = steps or task.steps
        self.split: Split = task.split(seed)
        self.batches = task.batches(self.split, seed, self.steps)
        self.clock = Clock()
        self.told: list[dict[str, Any]] = []
        self.growth: esper.Growth | None = None
        self.done = 0
        self.step_flops = STEP * forward_flops(net, self.split.train[0])  # of one example
        self.spent = 0
        with self.clock:
            self.optimizer = task.optimizer(net.parameters(), lr=rate)
            self.scheduler = task.scheduler(self.optimizer, schedule, rate, self.steps)
            if grow is not None:
                self.growth = self._grow(grow)

    def _grow(self, settings: Mapping[str, Any]) -> esper.Growth:
        """Begin growth: at most as large as the full network is all that a user says."""
        limit = parameters(self.task.build(self.task.full, self.seed))
        given = {"budget": {"parameters": limit}, "seed": stream(self.seed, "growth"), **settings}
        return esper.grow(
            self.net,
            self.optimizer,
            self.loss,
            probe=self.task.probe(self.split),
            steps=self.steps,
            schedulers=[] if self.scheduler is None else [self.scheduler],
            on_event=self._hear,
            **given,
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(model(batch[0]), batch[1])

    def _hear(self, event: Event) -> None:
        if event.kind in TOLD:
            self.told.append({"kind": event.kind, "step": event.step, **event.data})

    def advance(self, steps: int) -> None:
        """Train on, and end growth with the last step."""
        with self.clock:
            for _ in range(min(steps, self.steps - self.done)):
                x, y = next(self.batches)
                loss = self.task.loss(self.net(x), y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                if self.scheduler is not None:
                    self.scheduler.step()
                if self.growth is not None:
                    self.growth.step((x, y), loss)
                self.spent += self.step_flops * len(x)
                self.done += 1
            if self.growth is not None and self.done == self.steps:
                self.net = self.growth.finish()

    @property
    def training_flops(self) -> int:
        return self.spent if self.growth is None else self.growth.cost.training_flops

    @property
    def growth_flops(self) -> int:
        return 0 if self.growth is None else self.growth.cost.growth_flops

    def result(self, curve: tuple[tuple[int, int, float], ...] = ()) -> Run:
        """Judge the trained network."""
        probe, probe_loss = self.task.judge(self.net, self.split.probe)
        test, test_loss = self.task.judge(self.net, self.split.test)
        return Run(
            task=self.task.name,
            seed=self.seed,
            rate=self.rate,
            schedule=self.schedule,
            steps=self.steps,
            size=self.size(),
            parameters=parameters(self.net),
            probe=probe,
            probe_loss=probe_loss,
            test=test,
            test_loss=test_loss,
            training_flops=self.training_flops,
            growth_flops=self.growth_flops,
            seconds=self.clock.wall,
            cpu_seconds=self.clock.cpu,
            growths=0 if self.growth is None else len(self.growth.plans),
            grew=tuple(self.told),
            curve=curve,
        )

    def size(self) -> Size | None:
        """Read the size back; a network of that size must have as many parameters, or it is None."""
        size = self.task.read(self.net)
        return size if parameters(self.task.build(size, self.seed)) == parameters(self.net) else None


def train(
    task: SuiteTask,
    net: nn.Module,
    seed: int,
    rate: float,
    schedule: Schedule = "constant",
    grow: Mapping[str, Any] | None = None,
    steps: int | None = None,
    points: int = 1,
) -> Run:
    """Train one network to the end.

    Args:
        task: The task.
        net: As ``task.build(size, seed)`` makes it.
        seed: Of data and order.
        rate: Learning rate, the highest of a schedule.
        schedule: Of the rate, over the whole of the run.
        grow: None: no growth. A mapping: growth with these arguments of ``esper.grow``, none of them needed.
        steps: Length of the run; None: the task's.
        points: Of the curve of test metric against FLOPs; 1 judges at the end alone.
    """
    training = Training(task, net, seed, rate, schedule, grow, steps)
    curve = []
    for point in range(1, points + 1):
        training.advance(training.steps * point // points - training.done)
        if points > 1:
            spent = training.training_flops + training.growth_flops
            score = task.judge(training.net, training.split.test)[0]
            curve.append((spent, parameters(training.net), score))
    return training.result(tuple(curve))
