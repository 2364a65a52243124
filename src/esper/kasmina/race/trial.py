"""One decision's way from germination to its outcome: its stages' lengths, its memory, what it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from esper.batches.joins import Joins
from esper.blueprints.kernel import LiveKernel
from esper.config import Config
from esper.contracts import Decision, Observer, Outcome
from esper.distributed.collectives import Peers
from esper.distributed.model_wrapper import Wrapping
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.gate import Gate, Verdict
from esper.kasmina.race.needs import Commits, Draws, Forges, Runs, Scales
from esper.kasmina.race.own_optimizers import OwnOptimizers
from esper.kasmina.race.race import Race
from esper.kasmina.recording.flops import Ledger
from esper.kasmina.seeds.layer import KasminaLayer, Tap
from esper.kasmina.widths.places import gone


@dataclass(frozen=True, slots=True)
class Timing:
    """How many steps each stage lasts."""

    incubate: int
    ramp: int
    stabilise: int
    evaluate: int
    embargo: int

    @classmethod
    def of(cls, config: Config, steps: int | None, settling: int) -> Timing:
        """Derive from the run's length what the settings leave open.

        Args:
            config: Settings of the run.
            steps: Optimizer steps of the run; None counts as 1,000.
            settling: Steps the host's running statistics need to settle (0 without BatchNorm).
        """
        length = steps or 1000
        ramp = config.blend.ramp or min(max(length // 250, 4), 100)
        stabilise = config.blend.stabilise if config.blend.stabilise is not None else max(ramp // 2, settling)
        return cls(
            incubate=config.race.steps or min(max(length // 16, 8), 200),
            ramp=ramp,
            stabilise=stabilise,
            evaluate=config.blend.evaluate or ramp,
            embargo=math.ceil(config.schedule.embargo * length),
        )


@dataclass
class Trial:
    """One decision on its way from germination to its outcome."""

    decision: Decision
    seed: int
    layer: KasminaLayer
    started: int  # step of the last move
    race: Race | None = None
    tap: Tap = field(default_factory=Tap)
    kernel: LiveKernel | None = None
    optimizer: torch.optim.Optimizer | None = None
    verdict: Verdict | None = None
    before: list[float] = field(default_factory=list)  # losses ahead of exposure
    after: list[float] = field(default_factory=list)
    ending: str = ""  # why α is on its way down
    waiting: bool = False  # for growth.rewrap(), where layers cannot change their shapes at any step
    spent: int = 0  # growth FLOPs before this trial
    size: tuple[int, int] = (0, 0)  # the model's parameters and forward FLOPs per example before it

    def lost(self, host: nn.Module) -> str:
        """Say which layer of its place the user has replaced; "" where all are there."""
        return next(iter(gone(host, [self.layer.place]).values()), "")


@dataclass(frozen=True)
class Given:
    """What the conductor gives the orchestrator."""

    passes: Runs
    gate: Gate
    ledger: Ledger
    observe: Observer
    donor: OwnOptimizers
    committer: Commits
    forging: Forges
    streams: Draws
    scaler: Scales
    wrapping: Wrapping  # where it is deferred, a kernel that has passed waits for commit_waiting()
    joins: Joins
    rate: float | None  # the candidates' learning rate, if the user chose one

    @property
    def peers(self) -> Peers:
        """The processes that train this model."""
        return self.wrapping.peers


def step_kernel(trial: Trial, given: Given) -> float:
    """Step an exposed kernel with the gradients that the host's backward pass left; returns their norm."""
    assert trial.kernel is not None and trial.optimizer is not None
    scale = float(given.scaler.get_scale())
    for parameter in trial.kernel.parameters():
        if parameter.grad is not None and scale != 1.0:
            parameter.grad.div_(scale)
    norm = float(torch.nn.utils.clip_grad_norm_(trial.kernel.parameters(), 1.0))
    if math.isfinite(norm):
        given.donor.follow(trial.optimizer)
        trial.optimizer.step()
    trial.optimizer.zero_grad()
    return norm


def summed(trial: Trial, model: MorphableModel, ledger: Ledger, kept: bool, reason: str) -> Outcome:
    """Sum up a trial."""
    return Outcome(
        trial.decision.id,
        trial.layer.place.site.name,
        kept,
        None if trial.verdict is None else trial.verdict.gain,
        model.parameter_count() - trial.size[0] if kept else 0,  # 0 too where it was folded in
        model.flops - trial.size[1] if kept else 0,
        ledger.growth_flops - trial.spent,
        reason,
    )


def worse(before: Sequence[float], after: Sequence[float]) -> bool:
    """Tell whether losses rose by more than two standard errors."""
    if len(before) < 2 or len(after) < 1:
        return False
    old, new = np.asarray(before), np.asarray(after)
    if new.min() > old.max():  # losses that explode have a spread that would excuse them
        return True
    spread = old.var(ddof=1) / len(old) + (new.var(ddof=1) if len(new) > 1 else old.var(ddof=1)) / len(new)
    return not float(new.mean()) <= float(old.mean()) + 2 * math.sqrt(float(spread))


def number(value: float) -> float | None:
    """Return a finite number, or None: JSON has no infinity."""
    return float(value) if math.isfinite(value) else None
