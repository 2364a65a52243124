"""``FaultyStorage``: a storage that fails when it is told to, in the middle of what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, overload

from esper.errors import CheckpointError
from esper.storage.protocol import Chunks, Storage

Verb = Literal["write", "read", "list", "delete", "mend"]
Trap = Callable[[Verb], None]


class FaultyStorage:
    """Passes everything on to a storage, and asks a trap before every single act.

    A checkpoint is written piece by piece, and every piece is an act: what the trap raises there comes up
    inside the storage's own writing, as an error of a disk would, and what it kills dies with half a
    checkpoint.

    Args:
        storage: Storage that keeps the checkpoints.
        trap: Function called before every act; it may raise ``OSError``, or not come back.
    """

    def __init__(self, storage: Storage, trap: Trap) -> None:
        self.storage, self.trap = storage, trap

    def put(self, name: str, parts: Mapping[str, Chunks]) -> None:
        """Keep a checkpoint.

        Raises:
            CheckpointError: The storage could not, or the trap raised.
        """
        with told(f"cannot keep {name}"):
            self.storage.put(name, {part: Pieces(chunks, self.trap) for part, chunks in parts.items()})

    def get(self, name: str, part: str) -> bytes:
        """Return one part.

        Raises:
            CheckpointError: The storage could not, or the trap raised.
        """
        with told(f"cannot read {part} of {name}"):
            self.trap("read")
            return self.storage.get(name, part)

    def names(self) -> list[str]:
        """List the checkpoints, sorted.

        Raises:
            CheckpointError: The storage could not, or the trap raised.
        """
        with told("cannot list the checkpoints"):
            self.trap("list")
            return self.storage.names()

    def delete(self, name: str) -> None:
        """Remove a checkpoint.

        Raises:
            CheckpointError: The storage could not, or the trap raised.
        """
        with told(f"cannot delete {name}"):
            self.trap("delete")
            self.storage.delete(name)

    def mend(self) -> None:
        """Finish or remove what a writer that was killed left behind.

        Raises:
            CheckpointError: The storage could not, or the trap raised.
        """
        with told("cannot mend the checkpoints"):
            self.trap("mend")
            self.storage.mend()


class Pieces(Sequence["bytes | memoryview"]):
    """A part's chunks; the trap is asked before each is handed out."""

    def __init__(self, chunks: Chunks, trap: Trap) -> None:
        self.chunks, self.trap = chunks, trap

    def __len__(self) -> int:
        return len(self.chunks)

    @overload
    def __getitem__(self, index: int) -> bytes | memoryview: ...
    @overload
    def __getitem__(self, index: slice) -> Chunks: ...
    def __getitem__(self, index: int | slice) -> bytes | memoryview | Chunks:
        if isinstance(index, slice):
            return Pieces(self.chunks[index], self.trap)
        chunk = self.chunks[index]
        self.trap("write")
        return chunk


@contextmanager
def told(what: str) -> Iterator[None]:
    """Say an operating system's error as a storage does."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{what}: {error.strerror}") from None
