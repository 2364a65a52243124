"""``io_error``: the storage fails once at its N-th act, and once more when the run comes back."""

from __future__ import annotations

import errno

from esper.chaos.child import Child
from esper.chaos.fault import Seen, Verdict
from esper.chaos.faults.full_disk import raise_errno
from esper.chaos.faults.kill import Kill, resumed
from esper.chaos.storage import FaultyStorage, Verb
from esper.checkpoint import Storage

__all__ = ["IoError"]

WRITES, READS = 40, 4  # acts among which the N-th is drawn


class IoError(Kill):
    """Raises EIO at the N-th act of the first process, kills it, and does the same to the second."""

    about = "an I/O error on the N-th call of the storage, while writing and while coming back"
    restarts = 2  # where not even the list of checkpoints can be read, the second process must end

    def storage(self, child: Child, storage: Storage) -> Storage:
        """Count every act."""
        attempt = child.spec.attempt
        nth = child.draw.randint(1, READS if attempt else WRITES)
        count = 0

        def trap(verb: Verb) -> None:
            nonlocal count
            if not attempt and not child.step:
                return  # nothing is written before
            count += 1
            if count == nth:
                child.mark("error", child.step, verb=verb, nth=nth)
                raise_errno(errno.EIO)

        return FaultyStorage(storage, trap) if attempt < self.restarts else storage

    def judge(self, seen: Seen) -> Verdict:
        """Judge by where it went on."""
        told = [
            f"EIO on call {mark['nth']} of process {mark['attempt'] + 1}, a {mark['verb']}"
            for mark in seen.of("error")
        ]
        verdict = resumed(seen)
        return Verdict(verdict.survived and bool(told), f"{'; '.join(told)}; {verdict.what}")
