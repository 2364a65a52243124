"""``kill_in_checkpoint``: the process is gone with half a checkpoint written."""

from __future__ import annotations

import os
import signal

from esper.chaos.child import Child
from esper.chaos.fault import Fault, Seen, Verdict
from esper.chaos.faults.kill import resumed
from esper.chaos.storage import FaultyStorage, Verb
from esper.checkpoint import Storage

__all__ = ["KillInCheckpoint"]

PIECES = 12  # of a checkpoint of a small model


class KillInCheckpoint(Fault):
    """Sends the process SIGKILL while a piece of a checkpoint is being written."""

    about = "kill -9 inside the writing of a checkpoint"
    restarts = 1

    def storage(self, child: Child, storage: Storage) -> Storage:
        """Count the pieces written from the fault's step on, and die at one of them."""
        left = child.draw.randrange(PIECES)

        def trap(verb: Verb) -> None:
            nonlocal left
            if verb != "write" or child.step < child.spec.at:
                return
            left -= 1
            if left < 0:
                child.strike("kill -9 in a checkpoint")
                os.kill(os.getpid(), signal.SIGKILL)

        return storage if child.spec.attempt else FaultyStorage(storage, trap)

    def judge(self, seen: Seen) -> Verdict:
        """Judge by where it went on."""
        return resumed(seen, "half a checkpoint was left; ")
