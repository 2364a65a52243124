"""What growth looked at, what came of it, and why nothing grew: ``print(growth)``, ``growth.report()``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast

from esper.printable import counted

Verdict = Literal["nothing", "open", "kept", "taken back"]


CHANCE = 0.05  # p-values above it are none at all
NO_EVIDENCE = "no evidence on held-out examples"
INSERTED = "inserted: the output is unchanged"
SPENT = "the budget is spent"
NONE_LEFT = "no place is left"
OVER = "the run ended before all its evidence was read"


@dataclass
class Looked:
    """One place at one event.

    Attributes:
        site: Its name.
        width: Units it had.
        units: New units that were tested; 0 where the budget left none.
        p_value: How likely evidence as strong is where they would not help; None is unknown.
        threshold: The p-value needed.
        gain: Held-out loss decrease that they promise, to second order; None is unknown.
        parameters: They would add.
        flops: Forward, per example, they would add.
        grown: Units added.
        reason: Why they were, or were not.
        together: The p-value of all places of the event, or of those that one number of a config rules, where
            it is what let this one pass.
    """

    site: str
    width: int
    units: int = 0
    p_value: float | None = None
    threshold: float | None = None
    gain: float | None = None
    parameters: int = 0
    flops: int = 0
    grown: int = 0
    reason: str = ""
    together: float | None = None

    @property
    def stopped(self) -> bool:
        """Whether something else than its evidence kept it from growing."""
        passed = self.p_value is not None and self.threshold is not None and self.p_value <= self.threshold
        return passed and not self.grown


@dataclass
class EventRecord:
    """One event: when, at what loss, place by place, and what became of it."""

    step: int
    why: str
    held_out: float | None  # mean held-out loss before it
    training: float | None  # mean of the latest training losses
    examples: int  # held out, or batches where the loss couples examples
    looked: list[Looked] = field(default_factory=list)
    reopened: str = "no"
    verdict: Verdict = "nothing"
    reason: str = ""


def record_from(data: Mapping[str, object]) -> EventRecord:
    """Rebuild a record from what ``dataclasses.asdict`` made of it."""
    looked = cast("list[dict[str, Any]]", data["looked"])
    facts: dict[str, Any] = {**data, "looked": [Looked(**one) for one in looked]}
    return EventRecord(**facts)


@dataclass
class Point:
    """One point of ``growth.curve()``; None is not measured."""

    step: int
    parameters: int
    flops: int  # forward, per example
    spent_flops: int  # training and growth together, so far
    held_out: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """Why what grew grew, and why the rest did not; ``print`` it, or ask for ``to_dict()``.

    Attributes:
        events: In order.
        refused: (place, reason) of places where nothing can grow.
        size: Parameters before and now.
        flops: Forward FLOPs per example before and now.
        cost: What growing spent, as a share of training.
        due: Steps of the events to come.
        advice: What to change, most useful first.
    """

    events: Sequence[EventRecord]
    refused: Sequence[tuple[str, str]]
    size: tuple[int, int]
    flops: tuple[int, int]
    cost: float | None
    due: Sequence[int]
    advice: Sequence[str]

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            "events": [asdict(event) for event in self.events],
            "refused": [list(one) for one in self.refused],
            "parameters": list(self.size),
            "flops": list(self.flops),
            "cost": self.cost,
            "due": list(self.due),
            "advice": list(self.advice),
        }

    def __str__(self) -> str:
        """Write it down for people."""
        lines = [
            f"{self.size[0]:,} parameters → {self.size[1]:,}; {self.flops[0]:,} FLOPs per example → "
            f"{self.flops[1]:,}"
            + ("" if self.cost is None else f"; growing cost {self.cost:.1%} of training")
        ]
        for event in self.events:
            lines.append(f"step {event.step}: {event.verdict}{_because(event.reason)}")
            lines += [f"  {_line(one)}" for one in event.looked]
            if event.reopened != "no":
                lines.append(f"  re-opened ({event.reopened})")
        if self.due:
            lines.append("still to come: events at steps " + ", ".join(map(str, self.due)))
        lines += [f"cannot grow: {place}: {reason}" for place, reason in self.refused]
        lines += [f"advice: {one}" for one in self.advice]
        return "\n".join(lines)


def _because(reason: str) -> str:
    return f", {reason}" if reason else ""


def _line(one: Looked) -> str:
    found = f"{one.site} ({counted(one.site, one.width)}): "
    found += f"+{counted(one.site, one.grown)}; " if one.grown else ""
    if one.p_value is not None and one.threshold is not None:
        found += f"p {one.p_value:.2g} where {one.threshold:.2g} is needed"
        found += "" if one.together is None else f", {one.together:.2g} with all places together"
        found += "" if one.gain is None else f", gain {one.gain:.3g}"
        found += f" for {one.parameters:,} parameters and {one.flops:,} FLOPs; "
    return found + one.reason


def advise(
    events: Sequence[EventRecord], due: Sequence[int], doubts: Sequence[str], steps: int | None
) -> list[str]:
    """Say what a user could change.

    Args:
        events: So far.
        due: Steps of events to come.
        doubts: Why nothing could pass, whatever the model is.
        steps: Of the run.
    """
    if doubts:
        return list(doubts)  # what was looked at says nothing of the model then
    found: list[str] = []
    if not events and steps is None:
        found.append("steps= was not given, and the loss never stalled: pass the number of optimizer steps")
    elif not events and not due:
        found.append("no event was due: the learning rate was gone, or steps= is far from what was run")
    looked = [one for event in events for one in event.looked]
    tested = [one for one in looked if one.units and not one.stopped]
    grown = any(one.grown for one in looked)
    wide = any(event.reason.startswith("already wide enough") for event in events)
    if wide:
        found.append("the model has room for what it learns; early.enough sets what that means")
    if looked and not wide and not grown:
        if any("budget.growth_flops" in one.reason for one in looked):
            found.append("an event costs more than the budget leaves: raise budget={'growth_flops': …}")
        elif any(one.reason == "the budget is spent" for one in looked):
            found.append("the budget leaves no room: raise budget={'parameters': …} or 'growth_factor'")
        elif not tested:
            pass  # every place says for itself why it was not asked
        elif all(one.p_value is None for one in tested):
            found.append("no place could be judged: hold out more, or pass per_example=")
        elif all(one.p_value is None or one.p_value > CHANCE for one in tested):
            found.append(
                "nothing says that new units would lower the loss of held-out examples: the model is wide "
                "enough, or the probe too small to tell"
            )
        else:
            found.append("there is some evidence, not enough: a larger probe would tell")
    if any(event.verdict == "taken back" for event in events):
        found.append("an event was taken back: the held-out loss had not fallen by 1 % since")
    elif grown and events[-1].reason == NO_EVIDENCE:
        found.append("the last event found no further evidence: a larger probe would tell, or early.further")
    return found
