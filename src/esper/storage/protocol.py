"""Where checkpoints are kept: the contract, and the smallest thing that keeps it."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeAlias

from esper.errors import CheckpointError

Chunks: TypeAlias = Sequence["bytes | memoryview"]  # of one part, end to end; tensors are never joined
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")  # of a checkpoint
PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def require(name: str, pattern: re.Pattern[str], what: str) -> str:
    """Return a name if it fits, so that none can lead elsewhere.

    Raises:
        CheckpointError: It does not.
    """
    if not pattern.fullmatch(name):
        raise CheckpointError(f"{name[:80]!r} is not {what}: a-z, 0-9 and - are allowed")
    return name


class Storage(Protocol):
    """Keeps checkpoints: groups of named parts that appear and vanish as a whole.

    One process writes, on one thread at a time; any number read. Whether a checkpoint is sound is for the
    reader to say, who has digests. Every method raises ``CheckpointError`` with what the storage said, or
    ``StoreError`` where it does not answer: a reader steps back past the one, never past the other.
    """

    def put(self, name: str, parts: Mapping[str, Chunks]) -> None:
        """Keep a checkpoint durably, and replace one of this name.

        The commit is atomic: a reader, also one after a power cut, finds all parts or none of them, and where
        this raises, what was there before. Where single parts are written in turn (an object store), the
        last one of ``parts`` is the commit: a group without it does not exist. The chunks are the caller's
        memory, which is written over once this returns.
        """

    def get(self, name: str, part: str) -> bytes:
        """Return one part."""

    def names(self) -> list[str]:
        """List the checkpoints, sorted."""

    def delete(self, name: str) -> None:
        """Remove a checkpoint; one that is not there is no error."""

    def mend(self) -> None:
        """Finish or remove what a writer that was killed left behind; called by the next writer."""


def part_of(storage: Storage, name: str, part: str, *, most: int) -> bytes:
    """Return one part, of which nothing is read where it is larger; a file of holes may be so.

    Args:
        storage: Storage of checkpoints; one that knows sizes has ``size(name, part)``.
        name: Name of the checkpoint.
        part: Name of the part.
        most: Number of bytes it may have.

    Raises:
        CheckpointError: It is not there, or larger.
    """
    size = getattr(storage, "size", None)
    known = None if size is None else size(name, part)
    content = storage.get(name, part) if known is None or known <= most else None
    if content is None or len(content) > most:
        found = known if content is None else len(content)
        raise CheckpointError(f"{name}: {part} is damaged: it has {found} bytes, and may have {most}")
    return content


class MemoryStorage:
    """Keeps checkpoints in this process: for tests, and for rolling back without a disk."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, bytes]] = {}
        self.lock = threading.Lock()

    def put(self, name: str, parts: Mapping[str, Chunks]) -> None:
        """Keep a checkpoint."""
        require(name, NAME, "a checkpoint's name")
        whole = {require(part, PART, "a part"): b"".join(chunks) for part, chunks in parts.items()}
        with self.lock:
            self.kept[name] = whole

    def get(self, name: str, part: str) -> bytes:
        """Return one part.

        Raises:
            CheckpointError: There is no such checkpoint or part.
        """
        require(name, NAME, "a checkpoint's name")
        require(part, PART, "a part")
        with self.lock:
            found = self.kept.get(name, {}).get(part)
        if found is None:
            raise CheckpointError(f"{name} has no {part}")
        return found

    def names(self) -> list[str]:
        """List the checkpoints, sorted."""
        with self.lock:
            return sorted(self.kept)

    def delete(self, name: str) -> None:
        """Remove a checkpoint."""
        require(name, NAME, "a checkpoint's name")
        with self.lock:
            self.kept.pop(name, None)

    def mend(self) -> None:
        """Do nothing: what a killed process kept is gone with it."""
