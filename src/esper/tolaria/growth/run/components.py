"""What one run consists of; ``assembly.py`` puts it together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from esper.batches.axes import Axes
from esper.batches.examples import LossFunction, PerExample
from esper.batches.joins import Joins
from esper.config import Budget, Config
from esper.contracts import Observer
from esper.distributed.model_wrapper import Wrapping
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.gate import Gate
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.recording.flops import Ledger
from esper.tamiyo.controller import Tamiyo
from esper.tolaria.growth.run.budget import Limits
from esper.tolaria.growth.run.commit import Committer
from esper.tolaria.growth.run.forging import Forging
from esper.tolaria.growth.run.streams import Streams


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
    observe: Observer
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
