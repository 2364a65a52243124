"""The early recipe: a few events, all places at once, inserted at once, judged afterwards.

An event reads training and held-out examples once each, forth and back, and asks at every place whether new
units would lower the loss of examples nobody has learned from. Places that pass are widened together by a
factor of two under the budget; nothing the model says changes at that moment. A saturated host is re-opened.
A while later the held-out loss must have fallen, or the event is taken back.
"""

from __future__ import annotations

from esper.tolaria.growth.early.growing import Growing
from esper.tolaria.growth.early.judging import Judging
from esper.tolaria.growth.early.reach import WAITS_FOR_BLOCK
from esper.tolaria.growth.early.state import Asking, EarlyRun
from esper.tolaria.growth.early.verdicts import looked_at
from esper.tolaria.growth.evidence.saturation import ENOUGH
from esper.tolaria.growth.run.account import NO_EVIDENCE, NONE_LEFT, OVER, SPENT, EventRecord, Looked
from esper.tolaria.growth.run.proven import Proven
from esper.tolaria.growth.run.state import RunState

PROMISING = 0.3  # p-value below which an event that grew nothing is asked again before the next


class Early(EarlyRun):
    """Grows one run early.

    Args:
        run: What the run knows of itself.
        proven: What the model was like when its places were proven.
    """

    def __init__(self, run: RunState, proven: Proven) -> None:
        super().__init__(run, proven)
        self.growth, self.judging = Growing(self), Judging(self)

    @property
    def growing(self) -> bool:
        """Whether anything may still grow, or be taken back."""
        under_way = self.open is not None or self.asking is not None or self.waiting is not None
        return under_way or self.timetable.pending

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
        gathers = evidence.waiting is not None or self.asking is not None
        return soon or gathers or step >= self.timetable.wake

    def step(self, loss: float) -> None:
        """Do what one optimizer step asks for."""
        with self.mishaps.contained("an event", self.skip):
            self.act(loss)

    def act(self, loss: float) -> None:
        """Judge what is due, keep batches, and hold an event."""
        run, now = self.run, self.run.steps
        if self.open is not None and now >= self.open.until and not self.parts.wrapping.deferred:
            self.judging.judge()
            self.timetable.wake = 0
        if run.asked is None and not self.listens(now):
            return
        self.evidence.collect(run.batches[-1], loss)
        if self.asking is not None:
            if not run.paused:
                self.go_on(self.asking)
            return
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
            self.judging.judge()
        if self.waiting is not None:
            why, self.waiting = self.waiting, None
            self.event(why)

    def finish(self) -> None:
        """Judge what is still open; there is no more time to give it.

        Where that cannot be done it stays, for its evidence came first. A look that is under way ends.
        """
        if self.asking is not None:
            self.skip(OVER)
        if self.open is not None:
            self.open.extended = True
            with self.mishaps.contained("the last judgement", self.judging.leave):
                self.judging.judge()

    def skip(self, why: str) -> None:
        """Leave everything in order where an event could not be held, or not be judged."""
        run, judged = self.run, self.open
        run.asked, self.timetable.wake = None, 0
        self.evidence.abandon()
        if self.asking is not None:
            self.asking.record.reason, self.asking = f"skipped: {why}", None
            return
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
        if self.open is not None and not self.judging.judge(early=True):
            self.timetable.put_off(self.open.until)  # nothing grows on what may be taken back
            return
        if not self.evidence.ready(why):
            self.timetable.wake = 0
            return
        only, run.asked = run.asked, None
        free = {name: p for name, p in self.reach.places().items() if only in (None, name)}
        room = run.remaining_budget()
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
            self.growth.decline(record, free, {}, doubt if units else SPENT if free else NONE_LEFT)
            return
        self.records.append(record)
        asking = self.asking = Asking(record, list(free), dict(units))
        spread = not self.parts.wrapping.deferred
        self.evidence.begin({name: free[name] for name in units}, units, spread)
        look = self.evidence.under_way
        if look is None or not look.spread:  # else the next step reads the first portion
            self.go_on(asking)

    def go_on(self, asking: Asking) -> None:
        """Go on looking; once all is read, grow the places that pass."""
        run, record, units = self.run, asking.record, asking.units
        if asking.before is None and self.evidence.concluding:  # a step of its own: it copies the run
            asking.before = self.insertion.remember(run.steps)
            return
        with self.parts.wrapping.gathered():
            found = self.evidence.go_on()
        if found is None:
            return
        self.asking = None
        free = {n: run.morphable.places[n] for n in asking.free if n in run.morphable.places}
        run.cost.grow(found.flops)
        record.held_out, record.examples = found.held_out, found.examples
        self.note_point(found.held_out)
        why_not = "" if run.plans else self.evidence.enough(found.held_out, self.timetable.learned)
        if why_not:
            if why_not.startswith(ENOUGH):
                self.timetable.clear()
            self.growth.decline(record, free, found.scored, why_not)
            return
        share = self.spending.threshold(len(self.spending.looks), 1)
        groups = self.reach.together(units)
        record.looked += looked_at(found, free, units, share, run.morphable.host, groups)
        passed = [one.site for one in record.looked if not one.reason]
        final, waits = self.reach.inserted({name: free[name] for name in passed})
        for one in record.looked:
            one.reason = WAITS_FOR_BLOCK if one.site in waits else one.reason
        if not final:
            if any(one.p_value is not None and one.p_value < PROMISING for one in record.looked):
                self.timetable.again(run.steps)
            self.growth.decline(record, free, found.scored, NO_EVIDENCE)
            return
        self.growth.grow(record, found, final, asking.before or self.insertion.remember(run.steps))
