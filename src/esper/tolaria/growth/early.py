"""The early recipe: a few events, all places at once, inserted at once, judged afterwards.

An event reads training and held-out examples once each, forth and back, and asks at every place whether new
units would lower the loss of examples nobody has learned from. Places that pass are widened together by a
factor of two under the budget; nothing the model says changes at that moment. A saturated host is re-opened.
A while later the held-out loss must have fallen, or the event is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from esper.contracts import Decision, Outcome, Stage
from esper.kasmina.growth_cost import growth_cost
from esper.kasmina.places import Place, WidenPlace
from esper.kasmina.reopen import SATURATED, multipliable
from esper.kasmina.score import Scored
from esper.kasmina.significance import Spending
from esper.kasmina.stack import Stack
from esper.tamiyo.controller import Room
from esper.tamiyo.early import allocate
from esper.tolaria.growth.account import EventRecord, Looked, Point, record_from
from esper.tolaria.growth.evidence import Evidence, Found
from esper.tolaria.growth.insertion import How, Insertion
from esper.tolaria.growth.streamed import Streamed
from esper.tolaria.growth.takeback import Before
from esper.tolaria.growth.timetable import Timetable

CHECKS = 4  # passes over a probe batch that prove an insertion and count its cost
ENOUGH = "already wide enough"
NEARLY, LATER = 1.5, 0.6  # times early.enough: who is asked again, and what it must be below then
SPENT = "the budget is spent"
REOPENED = 2  # times as long until a re-opened host is judged: its loss has been lifted first
PROMISING = 0.3  # p-value below which an event that grew nothing is asked again before the next
WITH_OTHERS = 0.25  # p-value up to which a place grows with the others, whose evidence carries it


@dataclass
class Judged:
    """An event whose worth is still open."""

    before: Before
    until: int  # the step at which it is judged
    held_out: float  # mean loss before it
    decisions: list[tuple[int, int, str, float | None, int, int]]  # id, seed, site, gain, parameters, flops
    record: EventRecord
    extended: bool = False  # it has not won so far, and has been given the same time again


class Early:
    """Grows one run early.

    Args:
        growth: The conductor: ``parts``, ``morphable``, ``steps``, ``batches``, ``tell``, ``asked``.
    """

    def __init__(self, growth: Any) -> None:
        self.growth, self.parts = growth, growth.parts
        self.settings = growth.config.early
        self.insertion = Insertion(self.parts.committer)
        self.evidence = Streamed(growth) if self.parts.example is not None else Evidence(growth)
        self.timetable = Timetable(growth)
        self.spending = Spending(growth.config.early.false_keep)
        self.open: Judged | None = None
        self.waiting: str | None = None  # why an event waits for growth.rewrap()
        self.records: list[EventRecord] = []
        self.points: list[Point] = []

    @property
    def growing(self) -> bool:
        """Whether anything may still grow, or be taken back."""
        return self.open is not None or self.waiting is not None or self.timetable.pending

    def doubts(self) -> list[str]:
        """Say at the start what would keep anything from growing."""
        evidence, streamed = self.evidence, self.parts.example is not None
        if streamed or evidence.found_values >= evidence.smallest:
            return []
        what = "examples" if evidence.additive else "batches, which the loss couples the examples of,"
        return [
            f"the probe has {evidence.found_values} {what} and nothing can pass with fewer than "
            f"{evidence.smallest}: hold out more" + ("" if evidence.additive else ", or pass per_example=")
        ]

    # -- the loop --------------------------------------------------------------------------------------------

    def wants(self, step: int) -> bool:
        """Tell whether there is anything to do at a step; most ask for nothing."""
        judged = self.open
        if judged is not None and step >= judged.until:
            return True
        return step >= self.timetable.wake or self.growth.asked is not None

    def step(self, loss: float) -> None:
        """Do what one optimizer step asks for."""
        growth = self.growth
        now = growth.steps
        if self.open is not None and now >= self.open.until and not self.parts.wrapping.deferred:
            self.judge()
            self.timetable.wake = 0
        if growth.asked is None and now < self.timetable.wake:
            return
        self.evidence.collect(growth.batches[-1], loss)
        why = self.evidence.due()
        if why is None:
            why = "asked for" if growth.asked is not None else self.timetable.reason(now, loss)
        if why is None or growth.paused:
            return
        if self.parts.wrapping.deferred:
            if self.waiting is None:
                growth.tell("warning", message="an event is due and waits until growth.rewrap() is called")
            self.waiting = why
        else:
            self.event(why)

    def rewrap(self) -> None:
        """Do what waited until the layers may change their shapes."""
        if self.open is not None and self.growth.steps >= self.open.until:
            self.judge()
        if self.waiting is not None:
            why, self.waiting = self.waiting, None
            self.event(why)

    def finish(self) -> None:
        """Judge what is still open."""
        if self.open is not None:
            self.judge()

    # -- an event --------------------------------------------------------------------------------------------

    def event(self, why: str) -> None:
        """Look at every place, and grow those that pass."""
        growth = self.growth
        if self.open is not None and not self.judge(early=True):
            self.timetable.put_off(self.open.until)  # nothing grows on what may be taken back
            return
        if not self.evidence.ready(why):
            self.timetable.wake = 0
            return
        only, growth.asked = growth.asked, None
        free = {name: p for name, p in self.places().items() if only in (None, name)}
        room = growth.room()
        units = self.allocated(free, room)
        record = EventRecord(growth.steps, why, None, self.evidence.training_loss, 0)
        if not units:
            if not self.waits_for_depth(room):
                self.timetable.clear()
                self.records.append(record)
                self.decline(record, free, {}, SPENT)
            return
        self.records.append(record)
        with self.parts.wrapping.whole():
            found = self.evidence.look({name: free[name] for name in units}, units)
        growth.cost.grow(found.flops)
        record.held_out, record.examples = found.held_out, found.examples
        self.note_point(found.held_out)
        room_enough = self.enough(found.held_out)
        if room_enough:
            self.decline(record, free, found.scored, room_enough)
            return
        passed = self.passing(record, found, free, units)
        final = self.allocated({name: free[name] for name in passed}, room)
        if not final:
            if any(one.p_value is not None and one.p_value < PROMISING for one in record.looked):
                self.timetable.again(growth.steps)
            self.decline(record, free, found.scored, "no evidence on held-out examples")
            return
        self.grow(record, found, free, final)

    def places(self) -> dict[str, Place]:
        """Return the places an event asks at: where blocks can be added, what is inside them stays as it is.

        Residual nets and transformers gained by depth and lost by inner width (char GPT, glyphs; see
        docs/decisions.md); once no further block fits the budget, widths are next.
        """
        found = self.growth.morphable.places
        stacks = {n: p for n, p in found.items() if isinstance(p, Stack)}
        pairs: dict[str, Place] = {n: p for n, p in found.items() if isinstance(p, WidenPlace)}
        if not stacks or not self.allocated(stacks, self.growth.room()):
            return pairs
        inside = tuple(f"{stack.container}." for stack in stacks.values())
        outside: dict[str, Place] = {n: p for n, p in pairs.items() if not p.site.entry.startswith(inside)}
        return outside if 1 + len(self.timetable.due) > self.timetable.late else {**outside, **stacks}

    def enough(self, held_out: float) -> str:
        """Say so where a host that has not grown learns nearly all there is by itself: it has room.

        Measured at the first event: a digits CNN of 16 and 32 channels is at 3 to 10 % of a guess's loss, one
        of 2 and 4, which gains 6 points by growing, at 24 %. One that comes near it is asked again.
        """
        guess, first_event = self.evidence.guess, len(self.records) == 1
        if guess is None or self.growth.plans:
            return ""
        share = held_out / guess
        told = f"its held-out loss is {share:.1%} of a guess's"
        if share < self.settings.enough * (1 if first_event else LATER):
            self.timetable.clear()
            return f"{ENOUGH}: {told}"
        if first_event and share < NEARLY * self.settings.enough:
            return f"it learns fast by itself: {told}"
        return ""

    def waits_for_depth(self, room: Room) -> bool:
        """Tell whether blocks can be added at a later event."""
        return bool(self.timetable.due and self.allocated(self.growth.morphable.stacks, room))

    def allocated(self, places: Mapping[str, Place], room: Room) -> dict[str, int]:
        """Return the units each place gets."""
        if room.events <= 0 or not places:
            return {}
        host, left = self.growth.morphable.host, min(1 + len(self.timetable.due), room.events)
        sites = [place.site for place in places.values()]
        return allocate(
            sites, self.settings.factor, left, room, lambda units: growth_cost(host, places, units)
        )

    def passing(
        self, record: EventRecord, found: Found, free: Mapping[str, Place], units: Mapping[str, int]
    ) -> list[str]:
        """Return the places that may grow, and write down what was found at each.

        A place passes by its own evidence; or all together pass, and it does not speak against it. The
        event's part of the false-keep budget is shared by both ways.
        """
        whole = self.spending.threshold(len(self.spending.looks), 1)
        alone = whole if len(units) == 1 else whole / 2 / len(units)
        together = joint(found, units)
        passed: list[str] = []
        host = self.growth.morphable.host
        for name, count in units.items():
            parameters, flops = growth_cost(host, free, {name: count})
            looked = Looked(name, free[name].site.width, count, None, alone, None, parameters, flops)
            record.looked.append(looked)
            one = found.scored.get(name)
            if one is None or not len(one.values):
                looked.reason = "not passed by these examples"
                continue
            looked.p_value, looked.gain = found.p_value(one.values), one.gain
            if looked.p_value is None:
                looked.reason = f"{len(one.values)} held-out values cannot be judged"
            elif looked.p_value <= alone or (
                together is not None and together <= whole / 2 and looked.p_value <= WITH_OTHERS
            ):
                passed.append(name)
            else:
                looked.reason = "the held-out gain may be chance"
        return passed

    def decline(
        self, record: EventRecord, free: Mapping[str, Place], scored: Mapping[str, Scored], reason: str
    ) -> None:
        """Grow nothing, and say why."""
        record.reason = reason
        known = {one.site for one in record.looked}
        record.looked += [
            Looked(name, place.site.width, reason=reason) for name, place in free.items() if name not in known
        ]
        self.tell_survey(record, scored)
        self.tell_decision(record, None, 0, f"{record.why}; {reason}")

    def grow(
        self, record: EventRecord, found: Found, free: Mapping[str, Place], units: Mapping[str, int]
    ) -> None:
        """Insert what passed."""
        growth = self.growth
        before = self.insertion.remember(growth.steps)
        decisions = list[tuple[int, int, str, float | None, int, int]]()
        moves = list[tuple[Looked, int]]()
        self.tell_survey(record, found.scored)
        for name, count in units.items():
            number = self.tell_decision(record, name, count, f"{record.why}; held-out evidence")
            one = next(one for one in record.looked if one.site == name)
            seed = self.germinate(name)
            decisions.append((number, seed, name, one.gain, one.parameters, one.flops))
            moves.append((one, count))
        kernels = {name: found.scored[name].kernel for name in units}
        widths = {n: count for n, count in units.items() if isinstance(free[n], WidenPlace)}
        with growth.watched_surgery():
            failed = self.insertion.widen(kernels, widths, before) if widths else ""
            for name in [n for n in units if n not in widths and not failed]:
                seed = self.parts.streams.draw("initialisation")
                failed = self.insertion.deepen(name, kernels[name], units[name], seed, before)
        if failed:
            record.reason = failed
            for number, seed, name, *_ in decisions:
                self.end(number, seed, name, None, failed)
            return
        for one, count in moves:
            one.grown, one.reason = count, "grown"
        growth.cost.grow(CHECKS * growth.morphable.flops * growth.morphable.examples)
        record.reopened = self.reopen()
        record.verdict = "open"
        growth.events_kept += 1
        share = self.settings.judge * (1 if record.reopened == "no" else REOPENED)
        until = growth.steps + self.timetable.length(share)
        self.open = Judged(before, until, found.held_out, decisions, record)
        for number, seed, name, *_ in decisions:
            self.move(seed, name, Stage.GERMINATED, Stage.STABILISING, "inserted: the output is unchanged")
            if name in widths:
                growth.tell("widened", **self.widened(number, name))
        growth.topology_changed()
        growth.expect(f"an event at step {growth.steps}", self.timetable.length(self.settings.judge))
        self.note_point(None)

    def reopen(self) -> How:
        """Re-open a saturated host; ``auto`` is for cross-entropy whose training loss is nearly satisfied."""
        how: How = "no"
        guess, training = self.evidence.guess, self.evidence.training_loss
        if self.settings.reopen == "auto":
            saturated = guess is not None and training is not None and training < SATURATED * guess
            how = "output" if saturated else "no"
        elif self.settings.reopen != "output" or guess is not None:
            how = self.settings.reopen
        if how == "output" and not multipliable(self.growth.morphable.host, self.evidence.outputs):
            how = "no"  # not every argmax would stay
        self.insertion.reopen(how, self.evidence.outputs)
        if how != "no":
            self.growth.tell("reopened", how=how, loss=training, guess=guess)
        return how

    # -- afterwards ------------------------------------------------------------------------------------------

    def judge(self, early: bool = False) -> bool:
        """Keep an event whose held-out loss has fallen since; take the others back.

        Args:
            early: The time is not up, because the next event is due: only what has won already is decided.

        Returns:
            Whether it is decided.
        """
        growth, judged = self.growth, self.open
        assert judged is not None
        with self.parts.wrapping.whole():
            now = self.evidence.held_out()
        growth.cost.grow(growth.morphable.flops * judged.record.examples)
        self.note_point(now)
        kept = now < judged.held_out
        if not kept and (early or not judged.extended):
            if not early:
                judged.extended, judged.until = True, growth.steps + judged.until - judged.before.step
            return False
        self.open = None
        reason = f"held-out loss {judged.held_out:.4g} → {now:.4g}"
        judged.record.verdict, judged.record.reason = ("kept" if kept else "taken back"), reason
        if not kept:
            lost = growth.steps - judged.before.step
            with growth.watched_surgery():
                self.insertion.restore(judged.before)
            growth.events_kept -= 1
            growth.topology_changed()
            sizes = {"parameters": growth.morphable.parameter_count()}
            growth.tell(
                "taken_back", to=judged.before.step, lost=lost, before=judged.held_out, now=now, **sizes
            )
        for number, seed, name, gain, parameters, flops in judged.decisions:
            self.end(number, seed, name, (gain, parameters, flops) if kept else None, reason)
        return True

    def end(
        self, decision: int, seed: int, site: str, kept: tuple[float | None, int, int] | None, reason: str
    ) -> None:
        """Move a seed to its end and tell the outcome."""
        stage = self.growth.morphable.layout.stage_of(seed)
        if kept is not None:
            self.move(seed, site, stage, Stage.EVALUATING, "the event is judged")
            self.move(seed, site, Stage.EVALUATING, Stage.FOSSILISED, reason)
            self.move(seed, site, Stage.FOSSILISED, Stage.DORMANT, "")
        else:
            self.move(seed, site, stage, Stage.ROLLED_BACK, reason)
            self.move(seed, site, Stage.ROLLED_BACK, Stage.CULLED, reason)
            self.move(seed, site, Stage.CULLED, Stage.EMBARGOED, "")
            self.move(seed, site, Stage.EMBARGOED, Stage.DORMANT, "the next event may ask again")
        gain, parameters, flops = kept or (None, 0, 0)
        outcome = Outcome(decision, site, kept is not None, gain, parameters, flops, 0, reason)
        self.growth.tell("outcome", **asdict(outcome))

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on: what is due, what is kept for it, and what is still judged."""
        judged = self.open
        return {
            "timetable": self.timetable.state_dict(),
            "evidence": self.evidence.state_dict(),
            "spending": self.spending.state_dict(),
            "waiting": self.waiting,
            "records": [asdict(record) for record in self.records],
            "points": [asdict(point) for point in self.points],
            "open": None
            if judged is None
            else {
                "before": judged.before.state_dict(),
                "until": judged.until,
                "held_out": judged.held_out,
                "extended": judged.extended,
                "decisions": [list(one) for one in judged.decisions],
                "record": self.records.index(judged.record),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        self.timetable.load_state_dict(state["timetable"])
        self.evidence.load_state_dict(state["evidence"])
        self.spending.load_state_dict(state["spending"])
        self.waiting = state["waiting"]
        self.records = [record_from(record) for record in state["records"]]
        self.points = [Point(**point) for point in state["points"]]
        judged = state["open"]
        self.open = None
        if judged is not None:
            self.open = Judged(
                Before.from_state(judged["before"]),
                judged["until"],
                judged["held_out"],
                [(i, seed, site, gain, p, f) for i, seed, site, gain, p, f in judged["decisions"]],
                self.records[judged["record"]],
                judged["extended"],
            )

    # -- telling ---------------------------------------------------------------------------------------------

    def germinate(self, site: str) -> int:
        """Wake a seed of a site."""
        model = self.growth.morphable
        seed = next(s for s in model.seeds(site) if model.layout.stage_of(s) is Stage.DORMANT)
        self.move(seed, site, Stage.DORMANT, Stage.GERMINATED, "held-out evidence")
        return seed

    def move(self, seed: int, site: str, source: Stage, target: Stage, reason: str) -> None:
        """Move a seed on and tell."""
        growth = self.growth
        growth.morphable.layout.move(seed, source, target, growth.steps)
        growth.orchestrator.note_move(seed, target)
        growth.tell("stage", seed=seed, site=site, source=source.name, target=target.name, reason=reason)

    def tell_survey(self, record: EventRecord, scored: Mapping[str, Scored]) -> None:
        """Tell what an event saw."""
        reports = {name: one.report for name, one in scored.items()}
        sites = [
            {
                "site": one.site,
                "width": one.width,
                "improvement": one.gain,
                "unit_flops": one.flops // max(one.units, 1),
                "dead": reports[one.site].dead if one.site in reports else None,
                "gradient_norm": reports[one.site].gradient_norm if one.site in reports else None,
                "examples": record.examples,
            }
            for one in record.looked
        ]
        self.growth.tell("survey", decision=self.growth.tamiyo.decisions + 1, sites=sites)

    def tell_decision(self, record: EventRecord, site: str | None, width: int, reason: str) -> int:
        """Number a decision and tell it, with the evidence behind it."""
        growth = self.growth
        growth.tamiyo.decisions += 1
        number = growth.tamiyo.decisions
        looked = [one for one in record.looked if site in (None, one.site)]
        gain = looked[0].gain if site is not None else None
        predicted = None if gain is None or not looked[0].flops else gain / looked[0].flops
        action = "nothing" if site is None else "widen"
        arms = tuple({"site": one.site, "width": one.units, "score": one.gain} for one in record.looked)
        decision = Decision(
            number,
            growth.steps,
            action,
            site,
            width,
            None if site is None else "scored",
            reason,
            1.0,
            predicted,
            arms,
        )
        growth.tell("decision", **growth.decided(decision))
        for one in looked:
            if one.threshold is not None:
                growth.tell("gate", **gated(number, one, record.examples, len(self.spending.looks)))
        return number

    def widened(self, decision: int, site: str) -> dict[str, Any]:
        """Describe what became wider."""
        plan = next(plan for plan in reversed(self.growth.plans) if plan.site == site)
        return {
            "decision": decision,
            "site": site,
            "units": plan.units,
            "edits": [[e.name, e.axis, e.old, e.new] for e in plan.edits],
            "parameters": self.growth.morphable.parameter_count(),
            "difference": 0.0,
            "milliseconds": None,
        }

    def note_point(self, held_out: float | None) -> None:
        """Write a point of the curve."""
        growth = self.growth
        spent = growth.cost.training_flops + growth.cost.growth_flops
        size = growth.morphable.parameter_count()
        self.points.append(
            Point(growth.steps, size, growth.morphable.flops, spent, held_out, dict(growth.metrics))
        )


def joint(found: Found, units: Mapping[str, int]) -> float | None:
    """Return the p-value of all places together, each counted in its own standard deviations."""
    values = [found.scored[name].values for name in units if name in found.scored]
    longest = max((len(one) for one in values), default=0)
    scaled = [one / one.std() for one in values if len(one) == longest and one.std() > 0]
    return found.p_value(np.sum(scaled, axis=0)) if len(scaled) > 1 else None


def gated(decision: int, one: Looked, examples: int, look: int) -> dict[str, Any]:
    """Describe a place's evidence; an e-value of 1/p is what a p-value is worth at most."""
    assert one.threshold is not None
    return {
        "decision": decision,
        "site": one.site,
        "look": look,
        "e_value": None if one.p_value is None else 1 / one.p_value,
        "threshold": 1 / one.threshold,
        "p_value": one.p_value,
        "needed": one.threshold,
        "gain": one.gain,
        "examples": examples,
        "passed": not one.reason,
        "reason": one.reason or "held-out evidence",
    }
