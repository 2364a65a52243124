"""``full_disk``: the disk of the run's folder has no room, then has some again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from esper.chaos import disk
from esper.chaos.child import Child
from esper.chaos.fault import Fault, Seen, Verdict
from esper.chaos.storage import FaultyStorage, Verb
from esper.checkpoint import Storage

__all__ = ["FullDisk"]


class FullDisk(Fault):
    """Fills the disk for two checkpoints' time; where none can be mounted, the storage says it is full."""

    about = "no room on the disk of the run's folder for a while"
    restarts = 1  # the journal of events ends the run, with its message, where it cannot write a decision
    mounts = True

    def prepare(self, child: Child) -> None:
        """Make room before the run is started again."""
        if child.spec.attempt and child.spec.namespace is not None:
            disk.free(Path(child.spec.run_dir))

    def storage(self, child: Child, storage: Storage) -> Storage:
        """Refuse every piece written while there is no room; only where there is no disk to fill."""
        if child.spec.namespace is not None:
            return storage
        return failing(child, storage, errno.ENOSPC, "ENOSPC injected into the storage")

    def arm(self, child: Child) -> None:
        """Fill the disk, and make room later."""
        folder = Path(child.spec.run_dir)
        if child.spec.namespace is None or child.spec.attempt:
            return

        def fill() -> None:
            child.strike("the disk is full (a tmpfs, real ENOSPC)")
            disk.fill(folder)

        child.once(child.spec.at, fill)
        child.once(over(child), lambda: disk.free(folder))

    def judge(self, seen: Seen) -> Verdict:
        """Judge by whether checkpoints were kept again."""
        return kept_again(seen)


def over(child: Child) -> int:
    """Return the step at which the trouble is over: two checkpoints failed."""
    return child.spec.at + 2 * (child.spec.every or 1) + 1


def failing(child: Child, storage: Storage, number: int, what: str) -> Storage:
    """Let every write fail for two checkpoints' time."""

    def trap(verb: Verb) -> None:
        if verb in ("write", "delete", "mend") and child.spec.at <= child.step < over(child):
            if not child.struck:
                child.strike(what)
            raise_errno(number)

    return FaultyStorage(storage, trap)


def raise_errno(number: int) -> None:
    """Raise what the operating system would; a storage says it in words of our own tree."""
    error = OSError(number, os.strerror(number))
    raise error


def kept_again(seen: Seen) -> Verdict:
    """Say how many checkpoints failed, and that training and checkpoints went on."""
    struck, finished = seen.struck, seen.finished
    if struck is None or finished is None:
        return Verdict(False, "it never came" if struck is None else "the run did not end")
    what, written = str(struck["what"]), int(finished["written"])
    if any(mark["attempt"] for mark in seen.marks):
        what += "; the run ended and was started again"
    else:
        what += f"; training went on, {finished['failures']} checkpoints were not written"
    return Verdict(written > 0, f"{what}; {written} were kept")
