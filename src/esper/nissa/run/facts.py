"""What events say, as types: their data as ``contracts.EVENT_FIELDS`` promises it, for those who read it.

Nothing is checked here: ``contracts.Event`` refuses an event that lacks a field, and ``damage.fitting`` turns
what an odd value leads to into an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict, TypeVar

from esper.contracts import ArmFacts, Event

Facts = TypeVar("Facts")


def facts_of(event: Event, kind: type[Facts]) -> Facts:
    """Read an event's data as the type of its kind."""
    data: Any = event.data
    return data


class SiteFacts(TypedDict):
    """A place where something can grow, as a run that begins tells it."""

    name: str
    width: int  # units
    between: Sequence[str]
    blueprint: NotRequired[str]


class RunStarted(TypedDict, total=False):
    """Data of ``run_started``; empty before."""

    model: str
    parameters: int
    flops: int  # forward, per example
    sites: list[SiteFacts]
    refused: list[tuple[str, str]]  # place, reason
    budget: Mapping[str, object]
    seed: int
    steps: int | None  # of the run
    growth: str  # the recipe
    limits: Mapping[str, object]  # what the budget allows
    redone: int  # steps, of a run that goes on


class RunFinished(TypedDict):
    """Data of ``run_finished``."""

    parameters: int
    flops: int
    training_flops: float
    growth_flops: float
    seconds: float
    grown: object


class DecisionFacts(TypedDict, total=False):
    """Data of ``decision``; empty where places were only surveyed."""

    decision: int
    action: str
    site: str | None
    width: int  # units
    start: str | None
    reason: str
    arms: list[ArmFacts]
    propensity: float
    predicted: float | None  # loss decrease per FLOP, first order


class RaceFacts(TypedDict):
    """Data of ``race``."""

    decision: int
    site: str
    candidates: list[Mapping[str, object]]
    winner: int | None  # its index
    amplitude: float | None


class LookFacts(TypedDict):
    """Data of ``gate``: one look at held-out examples."""

    decision: int
    site: str
    look: int
    e_value: float
    threshold: float
    p_value: NotRequired[float]
    needed: NotRequired[float]  # p-value
    gain: float | None
    examples: int
    passed: bool
    reason: str


class OutcomeFacts(TypedDict):
    """Data of ``outcome``."""

    decision: int
    site: str
    kept: bool
    gain: float | None
    parameters: int
    flops: int
    cost_flops: int
    reason: str


class GrownFacts(TypedDict):
    """Data of ``widened``, ``grafted`` or ``deepened``."""

    decision: int | None  # None: asked for by hand
    site: str
    parameters: int
    difference: float
    milliseconds: float
    units: NotRequired[int]
    edits: NotRequired[list[tuple[str, int, int, int]]]  # tensor, axis, old and new size
    blueprint: NotRequired[str]
    how: NotRequired[str]
    blocks: NotRequired[int]


class ReopenedFacts(TypedDict):
    """Data of ``reopened``."""

    how: str
    loss: float | None
    guess: float
