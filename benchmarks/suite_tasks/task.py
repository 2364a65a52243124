"""One task of the suite: data, networks by their size, and how an ordinary user would train them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from benchmarks.data import Split, stream

Batch = tuple[Tensor, Tensor]
Size = tuple[Any, ...]  # nested tuples of counts: hidden widths, or the blocks of a deep network
Schedule = Literal["constant", "cosine", "onecycle"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "cosine", "onecycle")
CHUNK = 1024  # examples of one evaluating pass


@dataclass(frozen=True)
class SuiteTask:
    """A host, its data and its training.

    Attributes:
        name: As on the command line.
        selection: Esper's defaults were chosen with an eye on it; conclusions are drawn on the others.
        split: Makes training, probe and test data from a seed.
        network: Builds the network of a size; randomness from torch's global generator.
        read: Reads the size back from a network, whatever grew.
        sizes: From the small one that growth starts at to the full one: the ladder a user would climb.
        loss: Of outputs and targets.
        metric: What is reported: share of right answers, or the loss itself.
        optimizer: Of parameters and ``lr``.
        rates: The grid every arm chooses from.
        steps: Optimizer steps of a run of full length.
        batch: Examples of a step; None is all of them.
        schedules: Those the published suite runs.
        seeds: Of the published suite: 10, or 5 where a run of the full size takes over 5 s.
        floor: Losses are compared as shares of at least this, since shares of a loss near zero say nothing.
    """

    name: str
    selection: bool
    split: Callable[[int], Split]
    network: Callable[[Size], nn.Module]
    read: Callable[[nn.Module], Size]
    sizes: tuple[Size, ...]
    loss: Callable[[Tensor, Tensor], Tensor]
    metric: Literal["accuracy", "loss"]
    optimizer: Callable[..., torch.optim.Optimizer]
    rates: tuple[float, float, float]
    steps: int
    batch: int | None
    schedules: tuple[Schedule, ...] = ("constant", "cosine")
    seeds: int = 10
    floor: float = 0.0

    @property
    def small(self) -> Size:
        return self.sizes[0]

    @property
    def full(self) -> Size:
        return self.sizes[-1]

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "accuracy"

    def build(self, size: Size, seed: int) -> nn.Module:
        """Build a network with initial weights that depend on size and seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "init"))
            return self.network(size)

    def batches(self, split: Split, seed: int, steps: int) -> Iterator[Batch]:
        """Feed ``steps`` batches, epoch after epoch, in an order that depends on the seed alone."""
        return islice(self._epochs(split, seed), steps)

    def _epochs(self, split: Split, seed: int) -> Iterator[Batch]:
        x, y = split.train
        order = torch.Generator().manual_seed(stream(seed, "order"))
        while True:
            if self.batch is None:
                yield x, y
                continue
            for rows in torch.randperm(len(x), generator=order).split(self.batch):
                yield x[rows], y[rows]

    def probe(self, split: Split) -> list[Batch]:
        """Hand the probe over as a user would: a list of batches, which can be read again and again."""
        x, y = split.probe
        size = min(self.batch or len(x), len(x))
        return list(zip(x.split(size), y.split(size), strict=True))

    def scheduler(
        self, optimizer: torch.optim.Optimizer, schedule: Schedule, rate: float, steps: int
    ) -> LRScheduler | None:
        """Make the scheduler of a run, stepped after every optimizer step; None for a constant rate."""
        if schedule == "constant":
            return None
        if schedule == "cosine":
            return CosineAnnealingLR(optimizer, T_max=steps)
        return OneCycleLR(optimizer, max_lr=rate, total_steps=steps)

    @torch.no_grad()
    def judge(self, net: nn.Module, part: Batch) -> tuple[float, float]:
        """Return metric and mean loss on a part, in eval mode; the mode is put back."""
        training = net.training
        net.eval()
        loss, right, count = 0.0, 0, 0
        for x, y in zip(part[0].split(CHUNK), part[1].split(CHUNK), strict=True):
            outputs = net(x)
            loss += float(self.loss(outputs, y)) * len(x)
            right += int((outputs.argmax(1) == y).sum()) if self.metric == "accuracy" else 0
            count += len(x)
        net.train(training)
        loss /= count
        return (right / count if self.metric == "accuracy" else loss), loss


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token alike: outputs (batch, time, classes), targets (batch, time)."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())
