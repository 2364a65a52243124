"""Why a decision was taken and what it was worth, as a mapping for programs and as text for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypedDict

from esper.errors import RunError
from esper.nissa.run.facts import GrownFacts, LookFacts, RaceFacts
from esper.nissa.run.history import RunHistory
from esper.nissa.run.records import DecisionHistory
from esper.nissa.run.survival import notes, reopened
from esper.nissa.wording import UNKNOWN, short
from esper.printable import BLOCK, counted, printable

_JOIN = ("decision", "site")  # said once per decision already


class Edit(TypedDict):
    """A tensor that became larger along an axis."""

    tensor: str
    axis: int
    old: int
    new: int


class Story(TypedDict):
    """What a decision saw, weighed, chose and came to; None where it did not get that far."""

    decision: int
    step: int
    action: str | None
    site: str | None
    width: int | None
    start: str | None
    scored: bool
    verdict: str
    reason: str | None
    propensity: float | None
    predicted: float | None  # loss decrease per FLOP, first order
    realised: float | None  # the same unit
    sites: list[dict[str, object]]
    arms: list[dict[str, object]]
    race: dict[str, object] | None
    gate: list[dict[str, object]]
    reopened: dict[str, object] | None
    outcome: dict[str, object] | None
    widened: dict[str, object] | None


def why(history: RunHistory, decision: int | None = None) -> list[Story]:
    """Explain one decision, or all of them in order.

    Args:
        history: History of the run.
        decision: Id of a decision; None explains every one.

    Raises:
        RunError: The run has no such decision.
    """
    if decision is None:
        return [explain(item) for item in history.decisions.values()]
    if decision not in history.decisions:
        known = ", ".join(map(str, history.decisions)) or "none"
        raise RunError(f"the run has no decision {decision}; its decisions: {known}")
    return [explain(history.decisions[decision])]


def explain(decision: DecisionHistory) -> Story:
    """Say what a decision saw, weighed, chose and came to; None where it did not get that far."""
    chosen, outcome = decision.chosen, decision.outcome
    return {
        "decision": decision.id,
        "step": decision.step,
        "action": decision.action,
        "site": decision.site,
        "width": chosen.get("width"),
        "start": chosen.get("start"),
        "scored": decision.scored,
        "verdict": decision.verdict,
        "reason": chosen.get("reason"),
        "propensity": chosen.get("propensity"),
        "predicted": chosen.get("predicted"),
        "realised": realised(decision),
        "sites": [dict(site) for site in decision.survey],
        "arms": [dict(arm) for arm in chosen.get("arms", ())],
        "race": _without(decision.race),
        "gate": [_look(decision, look) for look in decision.looks],
        "reopened": None if decision.reopened is None else dict(decision.reopened),
        "outcome": _without(outcome),
        "widened": _widened(decision),
    }


def realised(decision: DecisionHistory) -> float | None:
    """Measured loss decrease per added FLOP, to hold against ``predicted``.

    None where nothing was added, and where units were inserted at once: what they gain of themselves cannot
    be told from what the rest went on to learn.
    """
    outcome = decision.outcome
    if decision.scored:
        return None
    if outcome is None or outcome["gain"] is None or not outcome["flops"]:
        return None
    return float(outcome["gain"]) / float(outcome["flops"])


def headline(decision: DecisionHistory) -> str:
    """Say what was decided in half a line."""
    if decision.action == "widen":
        site, width = decision.chosen["site"], decision.chosen["width"]
        if site is not None and site.endswith(BLOCK):
            return f"deepen {site.removesuffix(BLOCK)} by {counted(site, int(width))}"
        return f"widen {site} by {width}"
    if decision.action == "graft":
        return f"grow {decision.site} of hidden width {decision.chosen['width']}"
    return "do nothing" if decision.action else "surveyed, not decided"


def evidence(look: LookFacts) -> str:
    """Say how strong a look's evidence was, and how strong it had to be."""
    if "p_value" in look:
        return f"p-value {short(look['p_value'], 2)} where {short(look['needed'], 2)} is"
    return f"e-value {short(look['e_value'])} of {short(look['threshold'])}"


def _look(decision: DecisionHistory, look: LookFacts) -> dict[str, object]:
    """Leave out what is said once per decision already; 1/p, where the p-value itself is known."""
    left_out = {"decision"} if decision.site is None else set(_JOIN)
    left_out |= {"e_value", "threshold"} if "p_value" in look else set()
    return {key: value for key, value in look.items() if key not in left_out}


def as_text(history: RunHistory, decision: int | None = None) -> str:
    """Explain one decision, or all of them, in plain lines.

    Raises:
        RunError: The run has no such decision.
    """
    stories = why(history, decision)
    told = ["\n".join(_lines(history.decisions[story["decision"]], story)) for story in stories]
    if decision is None and (survived := notes(history)):
        rows = (_row(f"{note.step:,}", f"{note.kind}: {note.text}") for note in survived)
        told.append("\n".join(("What the run survived, by step", *rows)))
    return "\n\n".join(told)


def _lines(decision: DecisionHistory, story: Story) -> Iterator[str]:
    title = f"Decision {decision.id} at step {decision.step}: {headline(decision)} — {decision.verdict}"
    yield printable(title, keep="")
    yield _row("why", story["reason"])
    for site in story["sites"]:
        measured = {
            key: value for key, value in site.items() if key not in ("site", "name") and value is not None
        }
        yield _row(
            "saw", f"{site.get('site', site.get('name'))}: {short(measured) or 'nothing could be measured'}"
        )
    for arm in () if decision.scored else story["arms"]:  # what is scored has to pass, not to be chosen
        yield _row("weighed", short(arm))
    if decision.action and not decision.scored:
        yield _row("chose", f"with probability {short(story['propensity'])}")
    if decision.race is not None:
        yield from _race_lines(decision.race)
    for look in decision.looks:
        yield _row(
            "gate",
            f"look {look['look']}{' at ' + look['site'] if decision.site is None else ''}: "
            f"gain {short(look['gain'])} on {short(look['examples'])} held out, {evidence(look)} needed: "
            f"{'passed' if look['passed'] else 'refused'}, {look['reason']}",
        )
    if decision.widened is not None:
        yield _grown_line(decision.widened, decision)
    if decision.reopened is not None:
        yield _row("reopened", reopened(decision.reopened))
    if (outcome := decision.outcome) is not None:
        yield _row("outcome", outcome["reason"])
        yield _row(
            "worth",
            f"per FLOP predicted {short(story['predicted'])}, realised {short(story['realised'])}; "
            f"+{short(outcome['parameters'])} parameters, +{short(outcome['flops'])} FLOPs per example"
            + (f"; judging cost {short(outcome['cost_flops'])} FLOPs" if outcome["cost_flops"] else ""),
        )


def _grown_line(grown: GrownFacts, decision: DecisionHistory) -> str:
    step = decision.widened_at
    if "how" in grown:
        how = "folded into the layer" if grown["how"] == "merged" else "a branch that stays"
        return _row("grafted", f"{how}, at step {step}")
    if "blocks" in grown:
        came = counted(grown["site"], decision.units)
        return _row("deepened", f"+{came} at step {step}, {grown['blocks']} in all")
    edits = "; ".join(
        f"{edit['tensor']} axis {edit['axis']}: {edit['old']}→{edit['new']}" for edit in _edits(grown)
    )
    return _row("widened", f"+{grown['units']} units at step {step} ({edits})")


def _race_lines(race: RaceFacts) -> Iterator[str]:
    for index, candidate in enumerate(race["candidates"]):
        yield _row("race", f"{index}: {short(candidate)}{'  ← won' if race['winner'] == index else ''}")
    yield _row("race", f"amplitude {short(race['amplitude'])}")


def _row(label: str, text: str | None) -> str:
    return printable(f"  {label:<8} {text or UNKNOWN}", keep="")


def _widened(decision: DecisionHistory) -> dict[str, object] | None:
    if decision.widened is None:
        return None
    edits = _edits(decision.widened)
    return {**(_without(decision.widened) or {}), "step": decision.widened_at, "edits": edits}


def _edits(grown: GrownFacts) -> list[Edit]:
    """Name the columns of the edits, which the event holds as plain rows; a graft edits no tensor."""
    rows = grown.get("edits", ())
    return [Edit(tensor=tensor, axis=axis, old=old, new=new) for tensor, axis, old, new in rows]


def _without(data: Mapping[str, object] | None) -> dict[str, object] | None:
    return None if data is None else {key: value for key, value in data.items() if key not in _JOIN}
