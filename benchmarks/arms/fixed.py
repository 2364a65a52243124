"""A network of one size from the first step to the last."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.arms import Setup
from benchmarks.flops import STEP, forward_flops


class Fixed:
    """Trained as its owner would without any of this; ``small`` is also the no-growth twin of a grown run."""

    growths = 0
    growth_flops = 0

    def __init__(self, setup: Setup, option: str) -> None:
        task = setup.task
        widths = task.small if option == "small" else (setup.widths or task.big)
        self.task, self.split = task, setup.split
        self.net = task.build(widths, setup.seed)
        self.optimizer = task.optimizer(self.net.parameters(), lr=setup.rate)
        self.batches = task.batches(setup.split, setup.seed)
        self.training_flops = 0
        inputs = setup.split.train[0]
        self.epoch_flops = STEP * forward_flops(self.net, inputs) * len(inputs)

    def epochs(self) -> Iterator[None]:
        for _ in range(self.task.epochs):
            for x, y in self.batches:
                loss = self.task.loss(self.net(x), y)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.training_flops += self.epoch_flops
            yield


start = Fixed
