"""The nouns that cross rooms: plain, frozen facts without tensors.

A class lives here only when at least two rooms use it; what one room needs alone lives in that room.
Unknown is ``None``, never a healthy default.
"""

from __future__ import annotations

import hashlib
import json
import time as clock
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any, Literal, NotRequired, Protocol, TypedDict

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
    "reopened": ("how", "loss", "guess"),  # a saturated host: its training loss, and that of equal logits
    "taken_back": ("to", "lost", "before", "now", "parameters"),  # its held-out loss did not fall
    "grafted": ("decision", "site", "blueprint", "how", "parameters", "difference", "milliseconds"),
    "deepened": ("decision", "site", "blocks", "parameters", "difference", "milliseconds"),
    "compiled": ("site", "kernel", "pipeline", "milliseconds", "speedup"),
    "recompiled": ("policy", "why"),
    "vitals": ("seed", "site", "score"),
    "fault": ("seed", "site", "error", "count"),
    "fallback": ("what", "why"),
    "warning": ("message",),
    "checkpoint": ("name", "step", "bytes", "seconds"),  # told when it was verified; seconds training stood
    "resumed": ("step", "name"),  # from a checkpoint: what stands before it of later steps is undone
    "alarm": ("alarm", "signal", "action", "since", "value", "usual", "expected", "message"),
    "rolled_back": ("to", "lost", "lost_in_all", "message"),
    "ranks": ("world", "rank", "why"),  # processes now, and what happened to which; rank None: to all
    "rewrapped": ("sites", "milliseconds"),  # where what had grown became part of the layers
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

    name: str  # "fc1>fc2": producer, consumer; "blocks.0+residual_mlp": place, blueprint
    kind: Literal["pair", "module", "span", "stack"]
    entry: str  # module path whose input is tapped
    exit: str  # module path whose output a kernel is added to; of several, the first that runs
    between: tuple[str, ...]  # what stands between, in order: "ReLU", "BatchNorm2d bn1", "flatten"
    width: int  # units now (blocks of a stack); 0 where there are none to count
    granularity: int  # widths grow by multiples of this (GroupNorm widens by whole groups)
    unit_parameters: int  # parameters one more unit adds
    unit_flops: int  # forward FLOPs per example one more unit adds
    blueprint: str = "widen"  # what grows here
    base_parameters: int = 0  # that the first unit brings besides its own
    most: int | None = None  # units at a time; None: as many as the budget allows
    others: tuple[str, ...] = ()  # further exits, where several layers read what is widened
    calls: int = 1  # of entry and of every exit in one pass: two of a siamese net

    @property
    def exits(self) -> tuple[str, ...]:
        """Every exit, in the order they run."""
        return self.exit, *self.others


@dataclass(frozen=True, slots=True)
class Signature:
    """The tensors a kernel must fit; a kernel of another signature is refused, never adapted.

    The geometry is that of a convolution the kernel runs beside; everywhere else it is empty, and a kernel
    keeps the size of every axis but the channels.
    """

    layout: Literal["vector", "sequence", "image"]  # (batch, c), (batch, time, c), (batch, c, h, w)
    port: Literal["parallel", "serial"]  # y + α·k(x), or y + α·k(y)
    inputs: int  # channels of the kernel's input
    outputs: int  # channels of what it is added to
    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    padding_mode: str = "zeros"

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> Signature:
        """Rebuild from what ``dataclasses.asdict`` made of it, through JSON or not."""
        facts: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**facts)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A blueprint built for one signature, as facts and bytes; the live module is kasmina's."""

    id: str  # digest of all that makes it: see :func:`kernel_id`
    graph: str  # canonical JSON
    signature: Signature
    hidden: int  # the blueprint's free width
    seed: int  # of the initial weights
    pipeline: str
    toolchain: str  # versions and device the compiled forms are for
    weights: bytes = field(repr=False)  # initial ones, safetensors
    variants: Mapping[str, bytes] = field(default_factory=dict, repr=False)  # compiled forms by pipeline
    report: Mapping[str, object] = field(default_factory=dict)  # what verification measured


def kernel_id(graph: str, signature: Signature, hidden: int, seed: int, pipeline: str, toolchain: str) -> str:
    """Return the digest of everything a kernel follows from: the same request is the same kernel.

    Args:
        graph: Canonical JSON of the blueprint.
        signature: Tensors the kernel fits.
        hidden: Free width, in units.
        seed: Seed of the initial weights.
        pipeline: Name of what compiles it.
        toolchain: Versions and device the compiled forms are for.

    Returns:
        SHA-256 digest, 64 hexadecimal digits.
    """
    facts = [graph, asdict(signature), hidden, seed, pipeline, toolchain]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class KernelStore(Protocol):
    """One tier of kernel bytes; the bytes are a sealed container, checked before they are parsed."""

    def get(self, kernel: str) -> bytes | None:
        """Return a kernel's container, or None."""

    def put(self, kernel: str, container: bytes) -> None:
        """Keep a container; the same one twice is no error."""

    def ids(self) -> list[str]:
        """List the kernels kept."""


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


class ArmFacts(TypedDict):
    """One thing that could have been done, as decisions and events tell it; early events tell the half."""

    site: str
    share: NotRequired[float]  # of the even share per event
    width: int  # units
    start: NotRequired[str]
    score: float | None  # first-order improvement per share of the budget
    prior: NotRequired[float]
    features: NotRequired[tuple[float, ...]]  # what the bandit was told; tamiyo.features.NAMES


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do at one decision boundary, and why: nothing, or grow one site."""

    id: int
    step: int
    action: Literal["widen", "graft", "nothing"]
    site: str | None
    width: int  # units to add
    start: str | None  # how candidates start: "svd", "random", "mixed"
    reason: str
    propensity: float  # probability with which this arm was chosen
    predicted: float | None  # first-order loss decrease per FLOP
    arms: tuple[ArmFacts, ...] = ()


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
    """One tensor that becomes larger along one axis.

    The new part comes at the end of the axis. Where the axis holds several parts of one size, as the gates of
    a GRU or q, k and v in one layer, a share of it comes at the end of each of these ``chunks``.
    """

    name: str  # parameter or buffer name in the model
    axis: int
    old: int
    new: int
    source: str  # the kernel tensor that fills the new slice, or "" where the fill is a constant
    chunks: int = 1  # equal parts of the axis; they divide old and new


@dataclass(frozen=True, slots=True)
class WidenPlan:
    """Growth of existing layers: drives modules, optimizers, EMA, checkpoints, replay and export.

    A tensor may grow along several axes, once along each. Edits are carried out in order: the slice of a
    later one fits the tensor as the earlier ones have left it.
    """

    site: str
    units: int
    edits: tuple[WidenEdit, ...]
    attributes: tuple[tuple[str, str, int], ...]  # (module, attribute, new value)

    def keyed(self) -> tuple[tuple[str, WidenEdit], ...]:
        """Pair each edit with the key of its slice: the tensor's name, "name@axis" from the second on."""
        seen: set[str] = set()
        keyed: list[tuple[str, WidenEdit]] = []
        for edit in self.edits:
            keyed.append((f"{edit.name}@{edit.axis}" if edit.name in seen else edit.name, edit))
            seen.add(edit.name)
        return tuple(keyed)


@dataclass(frozen=True, slots=True)
class DeepenPlan:
    """Growth of a stack of like blocks by one more, which changes nothing at birth."""

    site: str
    container: str  # module path of the ModuleList or Sequential; "" where it is the model itself
    index: int  # of the new block among the container's children
    name: str  # its name there; no other child changes its own
    donor: str  # module path of the block it is a copy of, but for the values of its tensors
    zeroed: tuple[str, ...]  # parameters of the block that start at zero
    counts: tuple[tuple[str, str, int | tuple[str, ...]], ...]  # (path of module or config, attribute, value)
