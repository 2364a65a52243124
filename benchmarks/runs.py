"""One training from a job to its figures, and several side by side for their wall time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from benchmarks import arms
from benchmarks.arms import Setup
from benchmarks.flops import parameters
from benchmarks.tasks import TASKS, Widths, hidden_widths

POINTS = 30  # of a curve


@dataclass(frozen=True)
class Job:
    """What a worker process needs to know: names and numbers."""

    task: str
    arm: str
    seed: int
    rate: float
    widths: Widths | None = None
    epochs: int | None = None  # a quick run's; None: the task's own

    def setup(self) -> Setup:
        task = TASKS[self.task]
        if self.epochs is not None:
            task = replace(task, epochs=self.epochs)
        return Setup(task, task.split(self.seed), self.seed, self.rate, self.widths)


@dataclass(frozen=True)
class Point:
    """A curve's point: what had been spent, how large the network was, what it scored on test data."""

    epoch: int
    flops: int
    parameters: int
    test: float


@dataclass(frozen=True)
class Result:
    """One training's figures; scores are the task's (accuracy, or mean squared error)."""

    task: str
    arm: str
    seed: int
    rate: float
    widths: Widths
    parameters: int
    growths: int
    train: float
    probe: float
    test: float
    test_loss: float
    training_flops: int
    growth_flops: int
    seconds: float  # training and growth; what is measured here for the curve is left out
    curve: tuple[Point, ...]

    @property
    def flops(self) -> int:
        return self.training_flops + self.growth_flops

    def to_dict(self) -> dict[str, object]:
        """Say everything but the curve, of which only the mean over seeds is kept on file."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "curve"}


def run(job: Job) -> Result:
    """Train one arm to the end."""
    setup = job.setup()
    task, split = setup.task, setup.split
    began = time.perf_counter()
    arm = arms.start(job.arm, setup)
    seconds = time.perf_counter() - began
    curve: list[Point] = []
    every = max(1, task.epochs // POINTS)
    epochs = arm.epochs()
    for epoch in range(task.epochs):
        seconds += advance(epochs)
        if (epoch + 1) % every == 0 or epoch + 1 == task.epochs:
            score = task.score(predict(arm.net, split.test[0]), split.test[1])
            spent = arm.training_flops + arm.growth_flops
            curve.append(Point(epoch + 1, spent, parameters(arm.net), score))
    return judge(job.arm, arm, setup, seconds, tuple(curve))


def judge(name: str, arm: arms.Arm, setup: Setup, seconds: float, curve: tuple[Point, ...] = ()) -> Result:
    """Judge a trained arm on every part."""
    task, split = setup.task, setup.split
    outputs = [(predict(arm.net, x), y) for x, y in (split.train, split.probe, split.test)]
    train, probe, test = (task.score(output, y) for output, y in outputs)
    return Result(
        task=task.name,
        arm=name,
        seed=setup.seed,
        rate=setup.rate,
        widths=hidden_widths(arm.net),
        parameters=parameters(arm.net),
        growths=arm.growths,
        train=train,
        probe=probe,
        test=test,
        test_loss=float(task.loss(*outputs[2])),
        training_flops=arm.training_flops,
        growth_flops=arm.growth_flops,
        seconds=seconds,
        curve=curve,
    )


def side_by_side(jobs: tuple[Job, ...]) -> list[float]:
    """Train several arms in turns of one epoch, in this process; return each one's seconds.

    What disturbs the machine then disturbs them alike; who goes first changes with every epoch.
    """
    setups = [job.setup() for job in jobs]
    running, seconds = [], []
    for job, setup in zip(jobs, setups, strict=True):
        began = time.perf_counter()
        running.append(arms.start(job.arm, setup).epochs())
        seconds.append(time.perf_counter() - began)
    for epoch in range(setups[0].task.epochs):
        turn = range(len(jobs)) if epoch % 2 == 0 else reversed(range(len(jobs)))
        for index in turn:
            seconds[index] += advance(running[index])
    return seconds


def advance(epochs: Iterator[None]) -> float:
    """Train one epoch; return its seconds."""
    began = time.perf_counter()
    next(epochs)
    return time.perf_counter() - began


@torch.no_grad()
def predict(net: nn.Module, inputs: Tensor) -> Tensor:
    """Run the whole of ``inputs`` in eval mode and put the mode back."""
    training = net.training
    net.eval()
    outputs = net(inputs)
    net.train(training)
    return outputs
