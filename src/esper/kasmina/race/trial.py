"""One decision's way from germination to its outcome: a type per phase, each with exactly what it needs.

A phase is built from the one before and never changed in place: who holds one that is over holds what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import nn
from torch.optim import Optimizer

from esper.blueprints.kernel import LiveKernel
from esper.contracts import Decision
from esper.kasmina.race.gate import Verdict
from esper.kasmina.race.race import Race
from esper.kasmina.seeds.layer import KasminaLayer, Tap
from esper.kasmina.widths.places import gone

Key: TypeAlias = tuple[str, int]  # site, and the seed's slot there


@dataclass(slots=True)
class Baseline:
    """What the outcome of a trial is counted from; it rises with what other seeds cost and add meanwhile."""

    spent: int  # growth FLOPs
    parameters: int
    flops: int  # forward, per example


@dataclass(frozen=True, slots=True)
class Origin:
    """What a trial is from its germination to its outcome."""

    decision: Decision
    site: str
    slot: int  # of the site's seeds
    seed: int  # row of the state layout
    layer: KasminaLayer
    baseline: Baseline

    @property
    def key(self) -> Key:
        """Where it stands among the seeds that are awake."""
        return self.site, self.slot

    def lost(self, host: nn.Module) -> str:
        """Say which layer of its place the user has replaced; "" where all are there."""
        return next(iter(gone(host, [self.layer.place]).values()), "")


@dataclass(frozen=True, slots=True)
class Germinated:
    """The seams are open; there are no candidates yet."""

    origin: Origin
    started: int  # step of the last move

    def training(self, race: Race) -> Training:
        """Begin to learn."""
        return Training(self.origin, self.started, Tap(), race)


@dataclass(frozen=True, slots=True)
class Training:
    """Candidates learn beside the host, which cannot tell."""

    origin: Origin
    started: int
    tap: Tap
    race: Race

    def judged(self, kernel: LiveKernel, verdict: Verdict) -> Judged:
        """End the race with a winner and what the gate says of it."""
        return Judged(self.origin, self.started, self.tap, kernel, verdict)


@dataclass(frozen=True, slots=True)
class Judged:
    """The race has a winner, and the gate has looked at it."""

    origin: Origin
    started: int
    tap: Tap
    kernel: LiveKernel
    verdict: Verdict

    def grafting(self, optimizer: Optimizer, before: list[float]) -> Grafting:
        """Let the winner in."""
        return Grafting(self.origin, self.started, self.tap, self.kernel, self.verdict, optimizer, before)


@dataclass(frozen=True, slots=True)
class Exposed:
    """The kernel is part of what the host gives, at strength α."""

    origin: Origin
    started: int
    tap: Tap
    kernel: LiveKernel
    verdict: Verdict
    optimizer: Optimizer  # the kernel's own
    before: list[float]  # losses ahead of exposure

    @property
    def losses(self) -> list[float]:
        """The losses of the evaluation so far."""
        return []

    def decaying(self, ending: str) -> Decaying:
        """Turn back; the kernel has been found wanting."""
        return Decaying(*carried(self), self.losses, ending)


@dataclass(frozen=True, slots=True)
class Grafting(Exposed):
    """α climbs."""

    def stabilising(self) -> Stabilising:
        """Stay at full strength."""
        return Stabilising(*carried(self))


@dataclass(frozen=True, slots=True)
class Stabilising(Exposed):
    """α is 1, and the host's statistics settle."""

    def evaluating(self) -> Evaluating:
        """Begin to compare losses."""
        return Evaluating(*carried(self), [])


@dataclass(frozen=True, slots=True)
class Compared(Exposed):
    """Has losses to compare with those ahead of exposure."""

    after: list[float]

    @property
    def losses(self) -> list[float]:
        """The losses of the evaluation so far."""
        return self.after


@dataclass(frozen=True, slots=True)
class Evaluating(Compared):
    """The loss is compared with that ahead of exposure."""

    def passed(self) -> Passed:
        """Stay a branch until layers may change their shapes."""
        return Passed(*carried(self), self.after)


@dataclass(frozen=True, slots=True)
class Passed(Compared):
    """Not worse than before; waits for ``growth.rewrap()``, where layers keep their shapes until then."""


@dataclass(frozen=True, slots=True)
class Decaying(Compared):
    """Found wanting: α is on its way down."""

    ending: str  # why


Trial: TypeAlias = Germinated | Training | Judged | Exposed
Carried: TypeAlias = tuple[Origin, int, Tap, LiveKernel, Verdict, Optimizer, list[float]]


def carried(trial: Exposed) -> Carried:
    """Return what every phase of an exposed kernel hands to the next."""
    return (
        trial.origin,
        trial.started,
        trial.tap,
        trial.kernel,
        trial.verdict,
        trial.optimizer,
        trial.before,
    )
