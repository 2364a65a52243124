"""The sections of the settings, each with its defaults, ranges and meanings."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from esper.errors import ConfigError

Rung = Literal["notify", "hold", "rollback", "stop"]  # what a governor may do, by severity


MOST_WHOLE = 10**18
MOST_SHARES = 64  # in a list of them
MOST_RUNGS = 16


class Section(BaseModel):
    """A frozen group of settings: a number is a number, not a truth value, nor text that looks like one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        """Take a list where a tuple is kept: YAML and JSON have no tuples."""
        try:
            return tuple(value) if isinstance(value, list) else value
        except Exception:  # a list of somebody else's class
            raise ConfigError("this list cannot be read; give one of Python's own") from None

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: object) -> object:
        """Refuse a number that no machine counts to."""
        if isinstance(value, int) and value > MOST_WHOLE:
            raise ConfigError(f"it is more than {MOST_WHOLE:,}, the most that is counted to")
        return value


class Early(Section):
    """The early recipe: a few events, all places at once, inserted without a race and judged afterwards."""

    shares: tuple[float, ...] = Field(
        (0.03, 0.08, 0.15, 0.25, 0.4, 0.6),
        min_length=1,
        max_length=MOST_SHARES,
        description="of the learning (the sum of learning rates) at which events fall; under a cosine "
        "they are .02, .04, .08, .13, .21 and .33 of the steps; the last two are in reserve, and for blocks",
    )
    factor: float = Field(2.0, gt=1, description="by which an event multiplies a width")
    examples: int = Field(1024, ge=32, description="examples an event reads at most, of either kind")
    reopen: Literal["auto", "output", "shrink", "no"] = Field(
        "auto", description="what an event does to a saturated host, see docs/how-it-grows.md"
    )
    false_keep: float = Field(
        0.05, gt=0, lt=1, description="probability that a run keeps anything where nothing helps"
    )
    further: float = Field(
        0.2, gt=0, lt=1, description="the same for each event after one that has paid: the run needs to grow"
    )
    enough: float = Field(
        0.08,
        ge=0,
        lt=1,
        description="of a guess's loss: a host that is below it without having grown is wide enough",
    )
    judge: float = Field(
        0.1,
        gt=0,
        le=1,
        description="share of the steps after which an event must have lowered the held-out loss",
    )

    @field_validator("shares")
    @classmethod
    def _within(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError("each share is a part of the learning, within 0 and 1")
        return shares


class Schedule(Section):
    """When to look for growth, where growth is incubated."""

    warmup: float = Field(0.1, ge=0, le=1, description="share of the steps before the first decision")
    stop: float = Field(0.9, gt=0, le=1, description="share of the steps after which no decision is due")
    plateau: bool = Field(True, description="bring a decision forward when the loss stalls")
    plateau_window: int = Field(50, ge=4, description="steps over which a stall is judged")
    patience: int = Field(5, ge=1, description="refused gates in a row after which growth rests")
    concurrent: int = Field(
        1, ge=1, le=16, description="seeds that may be awake at the same time, each at a place of its own"
    )
    embargo: float = Field(0.03, ge=0, le=1, description="share of the steps a culled site cools down")


class Race(Section):
    """How candidates compete before one of them may touch the model."""

    candidates: int = Field(8, ge=1, le=256, description="competitors in a race")
    steps: int | None = Field(
        None, ge=1, description="incubation steps; None: 1/16 of the run, within 8 to 200"
    )
    shadow_every: int | None = Field(
        None,
        ge=1,
        description="every k-th incubation step learns from the real loss, the others from the tapped "
        "gradient; None: every step, and a sample of steps and examples where a step takes over 5e8 FLOPs",
    )
    learning_rate: float | None = Field(
        None, gt=0, description="of the candidates; None: chosen from the host's"
    )
    batches: int = Field(
        4, ge=4, description="recent training batches kept for surveys and for judging the race"
    )
    examples: int = Field(512, ge=8, description="examples a survey reads at most")


class Gate(Section):
    """Held-out evidence before exposure."""

    false_keep: float = Field(
        0.05, gt=0, lt=1, description="false-keep budget of a whole run, over all looks"
    )
    looks: int | None = Field(
        None, ge=1, description="looks the budget is shared by; None: 1.5 per planned widening"
    )
    min_gain: float = Field(
        0.0, ge=0, description="smallest relative decrease of the held-out loss worth keeping"
    )


class Blend(Section):
    """How a winner is let in."""

    ramp: int | None = Field(None, ge=1, description="steps from alpha 0 to 1; None: from the run's length")
    stabilise: int | None = Field(None, ge=0, description="steps at alpha 1 before judging")
    evaluate: int | None = Field(None, ge=1, description="steps over which the loss must hold its trend")


class Widths(Section):
    """How much to add at a time."""

    shares: tuple[float, ...] = Field(
        (0.5, 1.0, 2.0),
        min_length=1,
        max_length=MOST_SHARES,
        description="arms: multiples of the even share per event",
    )
    min_units: int = Field(1, ge=1, description="smallest widening")

    @field_validator("shares")
    @classmethod
    def _positive(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not all(share > 0 for share in shares):
            raise ConfigError("each share is a positive multiple of the even one")
        return shares


EARLY = 100  # events
RACED = 4  # widenings a race keeps at most, where a budget does not say


class Budget(Section):
    """What growth may spend; None is unlimited. Where a count and its multiple are given, the count holds."""

    parameters: int | None = Field(
        None, ge=1, description="most parameters of the grown model, a count; None: growth_factor's"
    )
    growth_factor: float = Field(
        16.0, gt=1, description="most parameters of the grown model, a multiple of the host's"
    )
    model_flops: int | None = Field(
        None, ge=1, description="most forward FLOPs per example of the grown model, a count"
    )
    flops_factor: float | None = Field(
        None, gt=1, description="most forward FLOPs of the grown model, a multiple of the host's"
    )
    latency_ms: float | None = Field(
        None, gt=0, description="forward latency on a probe batch at which nothing more grows"
    )
    growth_events: int | None = Field(
        None, ge=0, description="events that grow; where they are raced, widenings kept (4 if left out)"
    )
    growth_flops: float | None = Field(
        None, gt=0, description="training FLOPs all growth may cost, asked before they are spent"
    )
    wall_seconds: float | None = Field(None, gt=0, description="seconds all growth may take")

    @property
    def raced_events(self) -> int:
        """Widenings that a race may keep."""
        return RACED if self.growth_events is None else self.growth_events

    @property
    def early_events(self) -> int:
        """Events of early growth that may grow; its timetable ends long before the number left out."""
        return EARLY if self.growth_events is None else self.growth_events

    @field_validator("parameters", "model_flops", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        """Take 1e6 where a count is meant, and refuse a fraction."""
        if not isinstance(value, float):
            return value
        if not value.is_integer():
            raise ConfigError(
                "a count is a whole number; growth_factor and flops_factor are multiples of the host's"
            )
        return int(value)


class Kernels(Section):
    """How the kernels of blueprints run while they grow; widened layers are the host's own."""

    pipeline: str = Field(
        "eager", description="eager, torchscript, export, inductor, or auto: the fastest right one, if any"
    )
    store: Path | None = Field(
        None, description="folder compiled kernels are kept in; None: $ESPER_KERNEL_STORE or the user's own"
    )
    budget_seconds: float = Field(
        1.0, gt=0, description="for what auto compiles and times, in the background"
    )
    deterministic: bool = Field(False, description="no clock decides: auto is eager")
    streams: bool = Field(
        False, description="CUDA: run parallel kernels on streams of their own; not measured"
    )

    @field_validator("store", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        """Take text for a path."""
        return Path(value) if isinstance(value, str) else value


class Telemetry(Section):
    """What is told to Nissa, and how often."""

    progress_every: int = Field(20, ge=1, description="steps between progress events")
    sampling: int = Field(10, ge=1, description="steps between measurements of an exposed kernel's vitals")
    smoothing: float = Field(0.1, gt=0, le=1, description="weight of a new measurement in a smoothed one")


class Governor(Section):
    """What is done about a fault; each ladder's last rung is repeated."""

    enabled: bool = Field(
        False, description="watch every step and act on faults; off, a loss that is not finite raises"
    )
    nonfinite: tuple[Rung, ...] = Field(
        ("rollback",),
        min_length=1,
        max_length=MOST_RUNGS,
        description="at the first, second, … value that is not finite",
    )
    spike: tuple[Rung, ...] = Field(
        ("notify", "hold", "rollback"),
        min_length=1,
        max_length=MOST_RUNGS,
        description="at spikes of loss or gradient norm",
    )
    divergence: tuple[Rung, ...] = Field(
        ("notify", "hold"),
        min_length=1,
        max_length=MOST_RUNGS,
        description="at a slow rise",
    )
    rate: tuple[Rung, ...] = Field(
        ("notify",),
        min_length=1,
        max_length=MOST_RUNGS,
        description="at a learning rate 10 × any before",
    )
    exposed: Rung = Field("rollback", description="least action at a spike while a seed is exposed")
    memory: int = Field(256, ge=1, description="steps within which alarms of a kind count together")
    rollbacks: int = Field(3, ge=0, description="near each other; one more is a stop")
    calm: int = Field(64, ge=1, description="steps without an alarm until held growth goes on")
    every: int = Field(100, ge=1, description="steps from one snapshot to the next")
    grace: int = Field(24, ge=1, description="steps an expected discontinuity may show")
    detector: str = Field("robust", description="what looks at loss, gradient norm, weights and rate")


class Distributed(Section):
    """How the processes of one run keep together."""

    mode: Literal["auto", "alone"] = Field(
        "auto", description="auto: as the model is wrapped; alone: a model of its own in each process"
    )
    deadline: float = Field(
        30.0, gt=0, description="seconds growth waits for another process, and a silent one is given up after"
    )
