"""``full_disk``: the disk of the run's folder has no room, then has some again."""

from __future__ import annotations

import errno
from pathlib import Path

from esper.tolaria.chaos import disk
from esper.tolaria.chaos.child import Child
from esper.tolaria.chaos.fault import Fault, Seen, Verdict
from esper.tolaria.chaos.storage import FaultyStorage, Verb
from esper.tolaria.checkpoint import Storage

__all__ = ["FullDisk"]


class FullDisk(Fault):
    """Fills the disk for two checkpoints' time; where none can be mounted, the storage says it is full."""

    about = "no room on the disk of the run's folder for a while"
    restarts = 1  # the journal of events ends the run, with its message, where it cannot write a decision
    mounts = True

    def storage(self, child: Child, storage: Storage) -> Storage:
        """Refuse every piece written while there is no room; only where there is no disk to fill."""
        if child.spec.namespace is not None:
            return storage
        return failing(child, storage, errno.ENOSPC, "ENOSPC injected into the storage")

    def arm(self, child: Child) -> None:
        """Fill the disk, and make room later; whoever starts the run again makes room first."""
        folder = Path(child.spec.run_dir)
        if child.spec.namespace is None:
            return None
        if child.spec.attempt:
            return disk.free(folder)

        def fill() -> None:
            child.strike("the disk is full (a tmpfs, real ENOSPC)")
            disk.fill(folder)

        child.once(child.spec.at, fill)
        child.once(over(child), lambda: disk.free(folder))
        return None

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
    """Raise what the operating system would."""
    error = OSError(number, disk.reason(number))
    raise error


def kept_again(seen: Seen) -> Verdict:
    """Say how many checkpoints failed, and that training and checkpoints went on."""
    struck, finished = seen.struck, seen.finished
    if struck is None or finished is None:
        return Verdict(False, "it never came" if struck is None else "the run did not end")
    restarted = any(mark["attempt"] for mark in seen.marks)
    failed = "the run ended and was started again" if restarted else f"{finished['failures']} not written"
    written = finished["written"]
    return Verdict(written > 0, f"{struck['what']}; checkpoints: {failed}, {written} kept before and after")
