"""What a fault is: how it comes, and how it shows that the run came through."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from esper.chaos.spec import Mark
from esper.storage.protocol import Storage

if TYPE_CHECKING:  # the process's own side imports torch, which must come after the clocks
    from esper.chaos.child import Child


GOVERNED: Mapping[str, object] = {"governor": {"enabled": True}}  # settings of growth


@dataclass(frozen=True)
class Verdict:
    """Whether a run that ended in the ordinary way came through its fault, and what it did, in a line."""

    survived: bool
    what: str


@dataclass(frozen=True)
class Seen:
    """What the processes of one rehearsal wrote down, oldest first."""

    marks: Sequence[Mark]

    def of(self, kind: str) -> list[Mark]:
        """Return the marks of a kind."""
        return [mark for mark in self.marks if mark["kind"] == kind]

    def events(self, *kinds: str) -> list[Mark]:
        """Return the marks of events; their facts are under ``data``."""
        return [mark for mark in self.of("event") if mark["event"] in kinds]

    def messages(self, part: str) -> list[str]:
        """Return what was warned of in words that hold a part."""
        found = [str(mark["data"].get("message", "")) for mark in self.events("warning")]
        return [message for message in found if part in message]

    @property
    def struck(self) -> Mark | None:
        """When the fault came first; None where it never did."""
        return next(iter(self.of("fault")), None)

    @property
    def finished(self) -> Mark | None:
        """The end of the run; None where it never came."""
        return next(iter(self.of("finished")), None)


class Fault:
    """One fault; each is a file in ``faults/``, whose name is the fault's.

    Attributes:
        about: Line on what is broken.
        restarts: Times something outside may start the process again; 0: it must not end.
        growth: Settings of growth it needs, over the config's.
        different: Reason why the weights cannot be those of the uninterrupted run; None: they must be.
        mounts: Whether it wants a disk of its own, where the system allows one.
        ranks: Processes that train together.
        relaunches: Times their launcher may start all of them again.
    """

    about: str = ""
    restarts: int = 0
    growth: Mapping[str, object] = {}
    different: str | None = None
    mounts: bool = False
    ranks: int = 1
    relaunches: int = 0

    def absent(self, whole: Seen) -> str | None:
        """Say why it cannot come in this run, judged by the uninterrupted one; None: it can."""
        return None

    def prepare(self, child: Child) -> None:
        """Do what must be done before the run is made: whoever starts it again has made room, for one."""

    def storage(self, child: Child, storage: Storage) -> Storage:
        """Return what the run's checkpoints go through."""
        return storage

    def arm(self, child: Child) -> None:
        """Line the fault up in a run that is about to begin, or to go on."""

    def damage(self, checkpoints: Path, draw: random.Random) -> str | None:
        """Damage what a dead process left on disk, and say what; between the first process and the second."""
        return None

    def judge(self, seen: Seen) -> Verdict:
        """Judge a run that ended in the ordinary way, with finite weights."""
        raise NotImplementedError
