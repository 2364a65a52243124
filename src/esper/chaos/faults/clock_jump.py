"""``clock_jump``: the clocks jump by hours, forward and then back."""

from __future__ import annotations

from esper.chaos import clock
from esper.chaos.child import Child
from esper.chaos.fault import Fault, Seen, Verdict

__all__ = ["ClockJump"]

HOURS = 3600.0


class ClockJump(Fault):
    """Sets every clock Python reads six hours forward, and the wall clock two days back later."""

    about = "all clocks jump 6 hours forward, later the wall clock 2 days back"

    def arm(self, child: Child) -> None:
        """Jump twice."""

        def forward() -> None:
            child.strike("the clocks jumped")
            clock.jump(6 * HOURS)

        child.once(child.spec.at, forward)
        child.once(child.spec.at + (child.spec.every or 1), lambda: clock.jump(-48 * HOURS, "time"))

    def judge(self, seen: Seen) -> Verdict:
        """Judge by the end: the weights show whether a decision read the clock."""
        finished = seen.finished
        kept = 0 if finished is None else finished["written"]
        what = f"clocks 6 h forward, then the wall clock 48 h back; {kept} checkpoints were kept"
        return Verdict(kept > 0, what)
