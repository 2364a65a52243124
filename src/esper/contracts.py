"""The nouns that cross rooms: plain, frozen facts without tensors.

A class lives here only when at least two rooms use it; what one room needs alone lives in that room.
Unknown is ``None``, never a healthy default.
"""

from __future__ import annotations

import time as clock
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

EVENTS_VERSION = 1

# Every kind of event with the fields its data must carry; more fields are allowed, fewer are not.
EVENT_FIELDS: dict[str, tuple[str, ...]] = {
    "run_started": ("model", "parameters", "flops", "sites", "refused", "budget", "seed", "steps"),
    "progress": ("loss", "parameters", "growth_flops", "training_flops", "seconds"),
    "epoch": ("epoch", "metrics"),
    "survey": ("decision", "sites"),
    "decision": ("decision", "action", "site", "width", "start", "reason", "arms", "propensity", "predicted"),
    "stage": ("seed", "site", "source", "target", "reason"),
    "alpha": ("seed", "site", "alpha"),
    "race": ("decision", "site", "candidates", "winner", "amplitude"),
    "gate": ("decision", "site", "look", "e_value", "threshold", "gain", "examples", "passed", "reason"),
    "outcome": ("decision", "site", "kept", "gain", "parameters", "flops", "cost_flops", "reason"),
    "widened": ("decision", "site", "units", "edits", "parameters", "difference", "milliseconds"),
    "fault": ("seed", "site", "error", "count"),
    "fallback": ("what", "why"),
    "warning": ("message",),
    "run_finished": ("parameters", "flops", "training_flops", "growth_flops", "seconds", "grown"),
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, told to whoever watches; ``data`` holds JSON values only."""

    kind: str
    step: int
    data: Mapping[str, Any]
    time: float = field(default_factory=clock.time)  # seconds since the epoch; no decision reads it

    def __post_init__(self) -> None:
        known = EVENT_FIELDS.get(self.kind)
        if known is None:
            raise ValueError(f"unknown event kind {self.kind!r}; known: {', '.join(EVENT_FIELDS)}")
        missing = [name for name in known if name not in self.data]
        if missing:
            raise ValueError(f"event {self.kind!r} lacks {', '.join(missing)}")


Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Watch nothing: the default observer."""


class Stage(IntEnum):
    """The life of a seed; the values are stored, so they are never renumbered."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    STABILISING = 4
    EVALUATING = 5
    FOSSILISED = 6
    CULLED = 7
    EMBARGOED = 8
    ERROR = 9
    ROLLED_BACK = 10


@dataclass(frozen=True, slots=True)
class Site:
    """A place where something can grow."""

    name: str  # "fc1>fc2": producer, consumer
    kind: Literal["pair"]
    entry: str  # module path whose input is tapped
    exit: str  # module path whose output a kernel is added to
    between: tuple[str, ...]  # what stands between, in order: "ReLU", "BatchNorm2d bn1", "flatten"
    width: int  # units now
    granularity: int  # widths grow by multiples of this (GroupNorm widens by whole groups)
    unit_parameters: int  # parameters one more unit adds
    unit_flops: int  # forward FLOPs per example one more unit adds


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place where nothing can grow, and why."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class HealthReport:
    """What was measured at one site on one survey; ``None`` is "not measured" and blocks a gate."""

    site: str
    improvement: float | None  # first-order loss decrease the best unit direction promises
    examples: int
    activation_mean: float | None = None
    activation_variance: float | None = None
    dead: float | None = None  # share of units at exactly zero on every example
    gradient_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do at one decision boundary, and why: nothing, or widen one site."""

    id: int
    step: int
    action: Literal["widen", "nothing"]
    site: str | None
    width: int  # units to add
    start: str | None  # how candidates start: "svd", "random", "mixed"
    reason: str
    propensity: float  # probability with which this arm was chosen
    predicted: float | None  # first-order loss decrease per FLOP
    arms: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a decision came to."""

    decision: int
    site: str
    kept: bool
    gain: float | None  # held-out loss decrease before exposure
    parameters: int  # added
    flops: int  # added, forward, per example
    cost_flops: int  # spent on the race and its evidence
    reason: str


@dataclass(frozen=True, slots=True)
class WidenEdit:
    """One tensor that becomes larger along one axis."""

    name: str  # parameter or buffer name in the model
    axis: int
    old: int
    new: int
    source: str  # the kernel tensor that fills the new slice, or "" where the fill is a constant


@dataclass(frozen=True, slots=True)
class WidenPlan:
    """Growth of existing layers: drives modules, optimizers, EMA, checkpoints, replay and export."""

    site: str
    units: int
    edits: tuple[WidenEdit, ...]
    attributes: tuple[tuple[str, str, int], ...]  # (module, attribute, new value)
