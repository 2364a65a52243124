"""The early recipe: a few events, all places at once, inserted at once, judged afterwards.

An event reads training and held-out examples once each, forth and back, and asks at every place whether new
units would lower the loss of examples nobody has learned from. Places that pass are widened together by a
factor of two under the budget; nothing the model says changes at that moment. A saturated host is re-opened.
A while later the held-out loss must have fallen, or the event is taken back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from esper.contracts import Stage
from esper.kasmina.depth.stack import widens
from esper.kasmina.evidence.reopen import How
from esper.kasmina.evidence.score import Scored
from esper.kasmina.evidence.significance import Spending
from esper.kasmina.widths.places import Place
from esper.surgery.isolation.undisturbed import undisturbed
from esper.tolaria.growth.early.hindsight import Hindsight
from esper.tolaria.growth.early.insertion import Insertion
from esper.tolaria.growth.early.judged import WORTH, Judged
from esper.tolaria.growth.early.reach import Reach
from esper.tolaria.growth.early.seeds import Decision, Seeds
from esper.tolaria.growth.early.takeback import Before
from esper.tolaria.growth.early.timetable import Timetable
from esper.tolaria.growth.early.verdicts import looked_at
from esper.tolaria.growth.evidence.evidence import Evidence, Found
from esper.tolaria.growth.evidence.saturation import ENOUGH
from esper.tolaria.growth.evidence.streamed import Streamed
from esper.tolaria.growth.run.account import NO_EVIDENCE, EventRecord, Looked, Point, record_from
from esper.tolaria.growth.run.allowance import CHECKS, Allowance
from esper.tolaria.growth.run.mishaps import Mishaps
from esper.tolaria.growth.run.state import RunState
from esper.tolaria.growth.run.telling import widened

INSERTED = "inserted: the output is unchanged"
SPENT = "the budget is spent"
NONE_LEFT = "no place is left"
REOPENED = 2  # times as long until a re-opened host is judged: its loss has been lifted first
PROMISING = 0.3  # p-value below which an event that grew nothing is asked again before the next


class Early:
    """Grows one run early.

    Args:
        run: What the run knows of itself.
    """

    def __init__(self, run: RunState) -> None:
        self.run, self.parts = run, run.parts
        self.settings = run.config.early
        self.insertion = Insertion(self.parts.committer, self.parts.streams.draw)
        self.evidence = Streamed(run) if self.parts.example is not None else Evidence(run)
        self.doubts = self.evidence.doubts()
        self.timetable = Timetable(run, self.evidence)
        self.reach = Reach(run, self.timetable)
        self.mishaps: Mishaps = run.mishaps
        self.hindsight = Hindsight(run, self.evidence, self.insertion)
        self.seeds = Seeds(run)
        self.allowance = Allowance(run)
        self.spending = Spending(self.settings.false_keep, self.settings.further)
        self.open: Judged | None = None
        self.waiting: str | None = None  # why an event waits for growth.rewrap()
        self.records, self.points = list[EventRecord](), list[Point]()

    @property
    def growing(self) -> bool:
        """Whether anything may still grow, or be taken back."""
        return self.open is not None or self.waiting is not None or self.timetable.pending

    # -- the loop --------------------------------------------------------------------------------------------

    def wants(self, step: int) -> bool:
        """Tell whether there is anything to do at a step; most ask for nothing."""
        judged = self.open
        if judged is not None and step >= judged.until:
            return True
        return self.listens(step) or self.run.asked is not None

    def listens(self, step: int) -> bool:
        """Tell whether batches and losses are kept: for an event, or to judge one by."""
        judged, evidence = self.open, self.evidence
        soon = judged is not None and step >= judged.until - evidence.judged_by
        return soon or evidence.waiting is not None or step >= self.timetable.wake

    def step(self, loss: float) -> None:
        """Do what one optimizer step asks for."""
        with self.mishaps.contained("an event", self.skip):
            self.act(loss)

    def act(self, loss: float) -> None:
        """Judge what is due, keep batches, and hold an event."""
        run, now = self.run, self.run.steps
        if self.open is not None and now >= self.open.until and not self.parts.wrapping.deferred:
            self.judge()
            self.timetable.wake = 0
        if run.asked is None and not self.listens(now):
            return
        self.evidence.collect(run.batches[-1], loss)
        why = self.evidence.due()
        if why is None and run.asked is not None:
            why = "asked for"
        if why is None and self.evidence.waiting is None:
            why = self.timetable.reason(now, loss, run.paused)
        if why is None or run.paused:
            return
        if self.parts.wrapping.deferred:
            if self.waiting is None:
                run.tell("warning", message="an event is due and waits until growth.rewrap() is called")
            self.waiting = why
        else:
            self.event(why)

    def rewrap(self) -> None:
        """Do what waited until the layers may change their shapes."""
        with self.mishaps.contained("an event", self.skip):
            self.act_on_waiting()

    def act_on_waiting(self) -> None:
        """Judge what is due, and hold the event that waited."""
        if self.open is not None and self.run.steps >= self.open.until:
            self.judge()
        if self.waiting is not None:
            why, self.waiting = self.waiting, None
            self.event(why)

    def finish(self) -> None:
        """Judge what is still open; there is no more time to give it.

        Where that cannot be done it stays, for its evidence came first.
        """
        if self.open is not None:
            self.open.extended = True
            with self.mishaps.contained("the last judgement", lambda why: self.keep(f"not judged: {why}")):
                self.judge()

    def skip(self, why: str) -> None:
        """Leave everything in order where an event could not be held, or not be judged."""
        run, judged = self.run, self.open
        run.asked, self.timetable.wake = None, 0
        self.evidence.abandon()
        if judged is not None:
            judged.until = max(judged.until, run.steps + self.timetable.length(self.settings.judge))
        if self.records and self.records[-1].step == run.steps:
            if self.records[-1].verdict == "nothing" and not self.records[-1].reason:
                self.records[-1].reason = f"skipped: {why}"
        elif judged is None:
            training = self.evidence.training_loss
            self.records.append(EventRecord(run.steps, "", None, training, 0, reason=f"skipped: {why}"))

    # -- an event --------------------------------------------------------------------------------------------

    def event(self, why: str) -> None:
        """Look at every place, and grow those that pass."""
        run = self.run
        if self.open is not None and not self.judge(early=True):
            self.timetable.put_off(self.open.until)  # nothing grows on what may be taken back
            return
        if not self.evidence.ready(why):
            self.timetable.wake = 0
            return
        only, run.asked = run.asked, None
        free = {name: p for name, p in self.reach.places().items() if only in (None, name)}
        room = run.room()
        units = self.reach.allocated(free, room)
        record = EventRecord(run.steps, why, None, self.evidence.training_loss, 0)
        for name, reason in self.reach.left_out(free if only is None else run.morphable.places).items():
            record.looked.append(Looked(name, run.morphable.places[name].site.width, reason=reason))
        if not units and self.reach.waits_for_depth(room):
            return
        self.doubts += self.evidence.trained_on() if units else []
        doubt = self.doubts[0] if self.doubts and only is None else ""
        doubt = doubt or self.allowance.dear(self.evidence, free, units)
        if not units or doubt:
            if doubt or not self.reach.resting:  # what rests may learn again by the next event
                self.timetable.clear()
            self.evidence.abandon()
            self.records.append(record)
            self.decline(record, free, {}, doubt if units else SPENT if free else NONE_LEFT)
            return
        self.records.append(record)
        with self.parts.wrapping.whole():
            found = self.evidence.look({name: free[name] for name in units}, units)
        run.cost.grow(found.flops)
        record.held_out, record.examples = found.held_out, found.examples
        self.note_point(found.held_out)
        why_not = "" if run.plans else self.evidence.enough(found.held_out, self.timetable.learned)
        if why_not:
            if why_not.startswith(ENOUGH):
                self.timetable.clear()
            self.decline(record, free, found.scored, why_not)
            return
        passed = self.passing(record, found, free, units)
        final = self.reach.allocated({name: free[name] for name in passed}, room)
        if not final:
            if any(one.p_value is not None and one.p_value < PROMISING for one in record.looked):
                self.timetable.again(run.steps)
            self.decline(record, free, found.scored, NO_EVIDENCE)
            return
        self.grow(record, found, final)

    def passing(
        self, record: EventRecord, found: Found, free: Mapping[str, Place], units: Mapping[str, int]
    ) -> list[str]:
        """Return the places that may grow, and write down what was found at each."""
        share = self.spending.threshold(len(self.spending.looks), 1)
        record.looked += looked_at(found, free, units, share, self.run.morphable.host)
        return [one.site for one in record.looked if not one.reason]

    def decline(
        self, record: EventRecord, free: Mapping[str, Place], scored: Mapping[str, Scored], reason: str
    ) -> None:
        """Grow nothing, and say why."""
        record.reason = reason
        known = {one.site for one in record.looked}
        record.looked += [
            Looked(name, place.site.width, reason=reason) for name, place in free.items() if name not in known
        ]
        self.seeds.tell_survey(record, scored)
        self.seeds.tell_decision(record, len(self.spending.looks), None, 0, f"{record.why}; {reason}")

    def grow(self, record: EventRecord, found: Found, units: Mapping[str, int]) -> None:
        """Insert what passed; whatever ends this in the middle, Ctrl-C too, takes all of it back."""
        run = self.run
        before, kept = self.insertion.remember(run.steps), run.events_kept
        self.evidence.remember()
        decisions = list[Decision]()
        try:
            self.insert(record, found, units, before, decisions)
        except BaseException as error:  # Ctrl-C too must leave no half of an event; it is raised again
            with run.reshaping(), undisturbed():
                self.insertion.restore(before)
            run.events_kept, self.open, record.verdict = kept, None, "nothing"
            record.reason = f"the grown model was put back: {type(error).__name__}: {error}"
            for one in record.looked:
                if one.grown or not one.reason:
                    one.grown, one.reason = 0, record.reason
            run.topology_changed()
            for decision in decisions:
                self.seeds.end(decision, False, record.reason)
            raise

    def insert(
        self,
        record: EventRecord,
        found: Found,
        units: Mapping[str, int],
        before: Before,
        decisions: list[Decision],
    ) -> None:
        """Insert what passed; places that cannot take it are closed for the rest of the run."""
        self.seeds.tell_survey(record, found.scored)
        looked = {one.site: one for one in record.looked}
        for name, count in units.items():
            why = f"{record.why}; held-out evidence"
            number = self.seeds.tell_decision(record, len(self.spending.looks), name, count, why)
            one, seed = looked[name], self.seeds.germinate(name)
            decisions.append(Decision(number, seed, name, one.gain, one.parameters, one.flops))
        failures = self.change(found, units, before)
        for decision in decisions:
            if decision.site in failures:
                self.seeds.end(decision, False, failures[decision.site])
        decisions[:] = [one for one in decisions if one.site not in failures]
        for name, count in units.items():
            failed = failures.get(name)
            looked[name].grown, looked[name].reason = (0, failed) if failed else (count, "grown")
        if not decisions:
            record.reason = "; ".join(dict.fromkeys(failures.values()))
            return
        self.await_judgement(record, found, before, decisions)

    def change(self, found: Found, units: Mapping[str, int], before: Before) -> dict[str, str]:
        """Widen and deepen the model; returns why, for each place that was not changed."""
        kernels = {name: found.scored[name].kernel for name in units}
        self.insertion.trials = [partial(self.parts.loss_of, batch) for batch in self.evidence.latest]
        with self.run.reshaping():
            widened, failures = self.insertion.carry_out(kernels, units, before)
        self.reach.barred.update(widened)
        return failures

    def await_judgement(
        self, record: EventRecord, found: Found, before: Before, decisions: list[Decision]
    ) -> None:
        """Leave an event open for as long as it is given to win, and tell what the model is now."""
        run = self.run
        run.cost.grow(CHECKS * run.morphable.flops * run.morphable.examples)
        record.reopened = self.reopen()
        record.verdict = "open"
        run.events_kept += 1
        share = self.settings.judge * (1 if record.reopened == "no" else REOPENED)
        until = run.steps + self.timetable.length(share)
        self.open = Judged(before, until, found.held_out, decisions, record)
        parameters = run.morphable.parameter_count()
        for number, seed, name, *_ in decisions:
            self.seeds.move(seed, name, Stage.GERMINATED, Stage.STABILISING, INSERTED)
            if widens(found.scored[name].kernel):
                run.tell("widened", **widened(run.plans, number, name, parameters))
        run.topology_changed()
        run.expect(f"an event at step {run.steps}", self.timetable.length(self.settings.judge))
        self.note_point(None)

    def reopen(self) -> How:
        """Re-open a saturated host."""
        saturation = self.evidence.saturation
        how = saturation.reopening(self.settings.reopen)
        self.insertion.reopen(how, saturation.outputs)
        if how != "no":
            loss = saturation.fitted or self.evidence.training_loss
            self.run.tell("reopened", how=how, loss=loss, guess=saturation.guess)
        return how

    # -- afterwards ------------------------------------------------------------------------------------------

    def judge(self, early: bool = False) -> bool:
        """Keep an event whose held-out loss has fallen since, by what is worth it; take the others back.

        Returns whether it is decided.

        Args:
            early: The time is not up, because the next event is due: only what has won already is decided.
        """
        run, judged = self.run, self.open
        assert judged is not None
        if dear := self.allowance.judged(judged.record.examples, early):
            if not early:
                self.keep(f"not judged: {dear}")
            return not early
        with self.parts.wrapping.whole():
            then, now = self.hindsight.losses(judged)
        self.note_point(now)
        kept = judged.won(now, not early and run.steps < judged.until, than=then)
        if not kept and (early or not judged.extended):
            if not early:
                judged.extended, judged.until = True, run.steps + judged.until - judged.before.step
            return False
        reason = judged.told(then, now)
        replaced = next(iter(self.reach.gone([one.site for one in judged.decisions]).values()), "")
        self.spending.paid = self.spending.paid or kept
        if kept or replaced:  # to take it back would overwrite the user's own new layer
            self.keep(reason if kept else f"{reason}; not taken back, for {replaced}")
            if kept and run.room().events > 0:
                self.timetable.further(run.steps)
            return True
        lost, record = run.steps - judged.before.step, judged.record
        with run.reshaping(), undisturbed():
            self.open = None
            record.verdict, record.reason = "taken back", f"{reason}; {WORTH:.0%} less was needed"
            self.insertion.restore(judged.before)
            run.events_kept -= 1
            run.topology_changed()
            sizes = {"parameters": run.morphable.parameter_count()}
            run.tell("taken_back", to=judged.before.step, lost=lost, before=then, now=now, **sizes)
            for decision in judged.decisions:
                self.seeds.end(decision, False, reason)
        return True

    @undisturbed()
    def keep(self, reason: str) -> None:
        """Let the open event stay."""
        judged = self.open
        assert judged is not None
        self.open = None
        judged.record.verdict, judged.record.reason = "kept", reason
        for decision in judged.decisions:
            self.seeds.end(decision, True, reason)

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on: what is due, what is kept for it, and what is still judged."""
        return {
            "timetable": self.timetable.state_dict(),
            "evidence": self.evidence.state_dict(),
            "spending": self.spending.state_dict(),
            "waiting": self.waiting,
            "barred": dict(self.reach.barred),
            "records": [asdict(record) for record in self.records],
            "points": [asdict(point) for point in self.points],
            "open": None if self.open is None else self.open.state_dict(self.records),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on."""
        self.timetable.load_state_dict(state["timetable"])
        self.evidence.load_state_dict(state["evidence"])
        self.spending.load_state_dict(state["spending"])
        self.waiting = state["waiting"]
        self.reach.barred.update(state.get("barred", {}))
        self.records = [record_from(record) for record in state["records"]]
        self.points = [Point(**point) for point in state["points"]]
        self.open = None if state["open"] is None else Judged.from_state(state["open"], self.records)

    # -- telling ---------------------------------------------------------------------------------------------

    def note_point(self, held_out: float | None) -> None:
        """Write a point of the curve."""
        self.points.append(self.run.point(held_out))
