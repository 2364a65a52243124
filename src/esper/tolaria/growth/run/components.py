"""What one run consists of; ``assembly.py`` puts it together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.batches.axes import Axes
from esper.batches.examples import LossFunction, PerExample
from esper.batches.joins import Joins
from esper.config import Budget, Config
from esper.distributed.model_wrapper import Wrapping
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.gate import Gate
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.recording.flops import Ledger
from esper.surgery.isolation.contexts import examining
from esper.tamiyo.controller import Tamiyo
from esper.tolaria.growth.run.budget import Limits
from esper.tolaria.growth.run.commit import Committer
from esper.tolaria.growth.run.forging import Forging
from esper.tolaria.growth.run.observers import Observers
from esper.tolaria.growth.run.streams import Streams

TIMED = 5  # passes of which the median counts


@dataclass
class RunComponents:
    """The parts of one run."""

    given: nn.Module  # what the user holds: the host, or what stands around it
    wrapping: Wrapping
    model: MorphableModel
    optimizers: dict[str, Optimizer]
    orchestrator: SeedOrchestrator
    tamiyo: Tamiyo
    committer: Committer
    ledger: Ledger
    gate: Gate
    forging: Forging
    streams: Streams
    joins: Joins
    config: Config
    budget: Budget
    limits: Limits
    observe: Observers
    loss_fn: LossFunction
    probe: Iterable[object]
    averages: Sequence[nn.Module]
    schedulers: Sequence[object]  # the user's
    loss_of: Callable[[object], Tensor]  # of a batch, through the host as it is
    example: object  # a batch like the loop's where the stream is its own probe, else None
    per_example: PerExample | None
    axes: Axes  # how the user's batches come in
    latency_ms: Callable[[], float]
    host_parameters: int
    host_flops: int
    steps: int | None
    seed: int
    warnings: list[str]
    epochs: int = 0


class Passes:
    """Runs a host.

    Args:
        host: The model that grows.
        loss_fn: The user's.
        batch: The first held-out batch.
    """

    def __init__(self, host: nn.Module, loss_fn: LossFunction, batch: object) -> None:
        self.host, self.loss_fn, self.batch = host, loss_fn, batch

    def loss_of(self, batch: object) -> Tensor:
        """Return the scalar loss of a batch, through the host as it is."""
        return self.loss_fn(self.host, batch)

    def over_probe(self) -> Tensor:
        """Return the loss of the first held-out batch."""
        return self.loss_of(self.batch)

    def latency_ms(self) -> float:
        """Return the median of five passes over the first held-out batch, in milliseconds."""
        times = []
        with examining(self.host):
            for _ in range(TIMED):
                begun = time.perf_counter()
                self.over_probe()
                times.append((time.perf_counter() - begun) * 1e3)
        return sorted(times)[TIMED // 2]
