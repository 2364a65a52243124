"""What passed is inserted, all of it or nothing, and waits to be judged; what did not is told."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from esper.contracts import Stage
from esper.kasmina.depth.stack import widens
from esper.kasmina.evidence.reopen import How
from esper.kasmina.evidence.score import Scored
from esper.kasmina.widths.places import Place
from esper.surgery.isolation.undisturbed import undisturbed
from esper.tolaria.growth.early.judged import Judged
from esper.tolaria.growth.early.seeds import Decision
from esper.tolaria.growth.early.state import EarlyRun
from esper.tolaria.growth.early.takeback import Before
from esper.tolaria.growth.evidence.evidence import Found
from esper.tolaria.growth.run.account import INSERTED, EventRecord, Looked
from esper.tolaria.growth.run.allowance import CHECKS
from esper.tolaria.growth.run.telling import widened

REOPENED = 2  # times as long until a re-opened host is judged: its loss has been lifted first


class Growing:
    """Inserts what passed at one event.

    Args:
        state: Of the early recipe.
    """

    def __init__(self, state: EarlyRun) -> None:
        self.state = state

    def decline(
        self, record: EventRecord, free: Mapping[str, Place], scored: Mapping[str, Scored], reason: str
    ) -> None:
        """Grow nothing, and say why."""
        record.reason = reason
        known = {one.site for one in record.looked}
        record.looked += [
            Looked(name, place.site.width, reason=reason) for name, place in free.items() if name not in known
        ]
        seeds, looks = self.state.seeds, len(self.state.spending.looks)
        seeds.tell_survey(record, scored)
        seeds.tell_decision(record, looks, None, 0, f"{record.why}; {reason}")

    def grow(self, record: EventRecord, found: Found, units: Mapping[str, int], before: Before) -> None:
        """Insert what passed; whatever ends this in the middle, Ctrl-C too, takes all of it back."""
        run = self.state.run
        kept = run.events_kept
        self.state.evidence.remember()
        decisions = list[Decision]()
        try:
            self.insert(record, found, units, before, decisions)
        except BaseException as error:  # Ctrl-C too must leave no half of an event; it is raised again
            with run.reshaping(), undisturbed():
                self.state.insertion.restore(before)
            run.events_kept, self.state.open, record.verdict = kept, None, "nothing"
            record.reason = f"the grown model was put back: {type(error).__name__}: {error}"
            for one in record.looked:
                if one.grown or not one.reason:
                    one.grown, one.reason = 0, record.reason
            run.topology_changed()
            for decision in decisions:
                self.state.seeds.end(decision, False, record.reason)
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
        self.state.seeds.tell_survey(record, found.scored)
        looked = {one.site: one for one in record.looked}
        for name, count in units.items():
            why = f"{record.why}; held-out evidence"
            number = self.state.seeds.tell_decision(record, len(self.state.spending.looks), name, count, why)
            one, seed = looked[name], self.state.seeds.germinate(name)
            decisions.append(Decision(number, seed, name, one.gain, one.parameters, one.flops))
        failures = self.change(found, units, before, {one.site: one.number for one in decisions})
        for decision in decisions:
            if decision.site in failures:
                self.state.seeds.end(decision, False, failures[decision.site])
        decisions[:] = [one for one in decisions if one.site not in failures]
        for name, count in units.items():
            failed = failures.get(name)
            looked[name].grown, looked[name].reason = (0, failed) if failed else (count, "grown")
        if not decisions:
            record.reason = "; ".join(dict.fromkeys(failures.values()))
            return
        self.await_judgement(record, found, before, decisions)

    def change(
        self, found: Found, units: Mapping[str, int], before: Before, decisions: Mapping[str, int]
    ) -> dict[str, str]:
        """Widen and deepen the model; returns why, for each place that was not changed."""
        state, kernels = self.state, {name: found.scored[name].kernel for name in units}
        state.insertion.trials = [partial(state.parts.loss_of, batch) for batch in state.evidence.latest]
        for scored in found.scored.values():
            scored.moves = ()  # they have told the gain, and are as large as the units
        with state.run.reshaping():
            widened, failures = state.insertion.carry_out(kernels, units, before, decisions)
        state.reach.barred.update(widened)
        return failures

    def await_judgement(
        self, record: EventRecord, found: Found, before: Before, decisions: list[Decision]
    ) -> None:
        """Leave an event open for as long as it is given to win, and tell what the model is now."""
        run = self.state.run
        run.cost.grow(CHECKS * run.morphable.flops * run.morphable.examples)
        record.reopened = self.reopen()
        record.verdict = "open"
        run.events_kept += 1
        share = self.state.settings.judge * (1 if record.reopened == "no" else REOPENED)
        until = run.steps + self.state.timetable.length(share)
        self.state.open = Judged(before, until, found.held_out, decisions, record)
        parameters = run.morphable.parameter_count()
        for number, seed, name, *_ in decisions:
            self.state.seeds.move(seed, name, Stage.GERMINATED, Stage.STABILISING, INSERTED)
            if widens(found.scored[name].kernel):
                run.tell("widened", **widened(run.plans, number, name, parameters))
        run.topology_changed()
        run.expect(f"an event at step {run.steps}", self.state.timetable.length(self.state.settings.judge))
        self.state.note_point(None)

    def reopen(self) -> How:
        """Re-open a saturated host as the settings say, and tell how."""
        state, saturation = self.state, self.state.evidence.saturation
        how: How = saturation.reopening(state.settings.reopen)
        state.insertion.reopen(how, saturation.outputs)
        if how != "no":
            loss = saturation.fitted or state.evidence.training_loss
            state.run.tell("reopened", how=how, loss=loss, guess=saturation.guess)
        return how
