"""``kill``: the process is gone between two machine instructions."""

from __future__ import annotations

import os
import signal
import threading
import time

from esper.chaos.child import Child
from esper.chaos.fault import Fault, Seen, Verdict

__all__ = ["Kill"]

WITHIN = 0.02  # seconds behind a step; the steps of small models take a few thousandths


class Kill(Fault):
    """Sends the process SIGKILL at a random instant."""

    about = "kill -9 at a random instant"
    restarts = 1

    def arm(self, child: Child) -> None:
        """Let a thread kill the first process, wherever the training thread is by then."""
        if child.spec.attempt == 0:
            child.once(child.spec.at, lambda: threading.Thread(target=die, args=[child], daemon=True).start())

    def judge(self, seen: Seen) -> Verdict:
        """Judge by where it went on."""
        return resumed(seen)


def die(child: Child) -> None:
    """End this process as a power cut would."""
    time.sleep(child.draw.uniform(0.0, WITHIN))
    child.strike("kill -9")
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(seen: Seen, before: str = "") -> Verdict:
    """Say where a run went on that was started again."""
    resumes = [mark for mark in seen.of("resumed") if mark["attempt"] > 0]
    if not resumes:
        return Verdict(False, "the process was never started again")
    struck = seen.struck
    at = "" if struck is None else f"killed after step {struck['step']}; "
    step = resumes[-1]["step"]
    way = f"went on from its checkpoint of step {step}" if step else "no checkpoint yet, began again"
    return Verdict(True, f"{at}{before}{way}")
