"""``lost_rank``: one of several processes that train together dies."""

from __future__ import annotations

import os
import signal

from esper.chaos.child import Child
from esper.chaos.fault import Fault, Seen, Verdict
from esper.chaos.faults.kill import resumed

__all__ = ["LostRank"]


class LostRank(Fault):
    """Kills the second of two ranks; the launcher starts both again, and they go on together."""

    about = "one of two processes that train together is killed"
    ranks = 2
    relaunches = 1

    def arm(self, child: Child) -> None:
        """Kill this process, if it is the one."""
        if child.rank == 1 and child.spec.attempt == 0:
            child.once(child.spec.at, lambda: die(child))

    def judge(self, seen: Seen) -> Verdict:
        """Judge by where both went on."""
        verdict = resumed(seen)
        return Verdict(verdict.survived, f"rank 1 of 2 {verdict.what}")


def die(child: Child) -> None:
    """End this process; the other one waits for it in the next collective."""
    child.strike("kill -9 of rank 1")
    os.kill(os.getpid(), signal.SIGKILL)
