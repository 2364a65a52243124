"""An event is kept for what the held-out loss has fallen by since, or everything is put back."""

from __future__ import annotations

from esper.surgery.isolation.undisturbed import undisturbed
from esper.tolaria.growth.early.judged import WORTH
from esper.tolaria.growth.early.state import EarlyRun


class Judging:
    """Judges the open event of a run.

    Args:
        state: Of the early recipe.
    """

    def __init__(self, state: EarlyRun) -> None:
        self.state = state

    def judge(self, early: bool = False) -> bool:
        """Keep an event whose held-out loss has fallen since, by what is worth it; take the others back.

        Returns whether it is decided.

        Args:
            early: The time is not up, because the next event is due: only what has won already is decided.
        """
        state, run, judged = self.state, self.state.run, self.state.open
        assert judged is not None
        if dear := state.allowance.judged(judged.record.examples, early):
            if not early:
                self.leave(dear)
            return not early
        with state.parts.wrapping.gathered():
            then, now = state.hindsight.losses(judged)
            overtaken = state.hindsight.overtaken(judged)
        state.note_point(now)
        kept = judged.won(now, not early and run.steps < judged.until, than=then)
        if not kept and (early or not judged.extended):
            if not early:
                judged.extended, judged.until = True, run.steps + judged.until - judged.before.step
            return False
        reason = judged.told(then, now)
        replaced = next(iter(state.reach.gone([one.site for one in judged.decisions]).values()), overtaken)
        state.spending.paid = state.spending.paid or kept
        if kept or replaced:  # to take it back would overwrite the user's own new layer
            self.keep(reason if kept else f"{reason}; not taken back, for {replaced}")
            if kept and run.remaining_budget().events > 0:
                state.timetable.further(run.steps)
            return True
        lost, record = run.steps - judged.before.step, judged.record
        with run.reshaping(), undisturbed():
            state.open = None
            record.verdict, record.reason = "taken back", f"{reason}; {WORTH:.0%} less was needed"
            state.insertion.restore(judged.before)
            run.events_kept -= 1
            run.topology_changed()
            sizes = {"parameters": run.morphable.parameter_count()}
            run.tell("taken_back", to=judged.before.step, lost=lost, before=then, now=now, **sizes)
            for decision in judged.decisions:
                state.seeds.end(decision, False, reason)
        return True

    @undisturbed()
    def keep(self, reason: str) -> None:
        """Let the open event stay."""
        judged = self.state.open
        assert judged is not None
        self.state.open = None
        judged.record.verdict, judged.record.reason = "kept", reason
        for decision in judged.decisions:
            self.state.seeds.end(decision, True, reason)

    def leave(self, why: str) -> None:
        """Let the open event stay, since it could not be judged."""
        self.keep(f"not judged: {why}")
