"""``esper.grow`` through the product's own path: the plain loop with its three lines."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

import esper
from benchmarks.arms import Setup
from benchmarks.data import stream
from benchmarks.flops import parameters
from benchmarks.tasks import Batch


class Grown:
    """Starts at the task's small widths and may grow up to the task's limit."""

    def __init__(self, setup: Setup, option: str) -> None:
        task = setup.task
        self.task = task
        self.net: nn.Module = task.build(task.small, setup.seed)
        self.optimizer = task.optimizer(self.net.parameters(), lr=setup.rate)
        self.batches = task.batches(setup.split, setup.seed)
        limit = parameters(task.build(task.limit or task.big, setup.seed))
        budget: dict[str, float] = {"parameters": limit}
        if task.events is not None:
            budget["growth_events"] = task.events
        steps_per_epoch = 1 if task.batch is None else -(-len(setup.split.train[0]) // task.batch)
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            self.loss,
            probe=probe_batches(setup),
            steps=task.epochs * steps_per_epoch,
            budget=budget,
            growth="incubate",
            config={**task.growth, **({"new_slot_state": option} if option else {})},
            seed=stream(setup.seed, "growth"),
        )

    def loss(self, model: nn.Module, batch: Batch) -> object:
        x, y = batch
        return self.task.loss(model(x), y)

    def epochs(self) -> Iterator[None]:
        for epoch in range(self.task.epochs):
            for x, y in self.batches:
                loss = self.task.loss(self.net(x), y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.growth.step((x, y), loss)
            if epoch == self.task.epochs - 1:
                self.net = self.growth.finish()
            yield

    @property
    def growths(self) -> int:
        return len(self.growth.plans)

    @property
    def training_flops(self) -> int:
        return self.growth.cost.training_flops

    @property
    def growth_flops(self) -> int:
        return self.growth.cost.growth_flops


def probe_batches(setup: Setup) -> list[Batch]:
    """Hand the probe over as a user would: a list of batches, which can be read again and again."""
    x, y = setup.split.probe
    size = setup.task.batch or len(x)
    return list(zip(x.split(size), y.split(size), strict=True))


start = Grown
