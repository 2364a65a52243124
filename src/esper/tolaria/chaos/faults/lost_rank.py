"""``lost_rank``: one of several processes that train together dies."""

from __future__ import annotations

from esper.tolaria.chaos.fault import Fault, Seen, Verdict

__all__ = ["LostRank"]


class LostRank(Fault):
    """Kills one of two ranks; the launcher starts both again, and they go on together."""

    about = "one of two processes that train together is killed"

    def absent(self, whole: Seen) -> str | None:
        """Say that there is nothing to lose yet."""
        return "not available: no process group"

    def judge(self, seen: Seen) -> Verdict:
        """Judge nothing."""
        return Verdict(False, "not available: no process group")
