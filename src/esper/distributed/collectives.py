"""What growth asks of the other processes that train the same model; alone, every answer is one's own.

A process looks at its own batches only. Whatever is decided on is first made the same everywhere, so that
every process grows the same thing at the same step. All of them must ask the same questions in the same
order: no question is put where one process may pass it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """The processes that train one model together.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
    """

    rank: int
    world: int

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over all processes, in place; the same bits everywhere."""

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Write rank 0's values into every process's tensors."""

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Join every process's rows, in the order of ranks; their number may differ."""

    def broadcast_floats(self, numbers: Sequence[float]) -> list[float]:
        """Return rank 0's numbers."""

    def all_ranks(self, holds: bool) -> bool:
        """Tell whether something holds in every process."""

    def all_gather_ints(self, record: Sequence[int]) -> list[list[int]]:
        """Return every process's record of whole numbers, in the order of ranks."""

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return every process's bytes on rank 0, nothing elsewhere."""

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Return rank 0's bytes."""


class Alone:
    """One process: nobody to ask."""

    rank = 0
    world = 1

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Leave them."""

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Leave them."""

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Return one's own rows."""
        return tensor

    def broadcast_floats(self, numbers: Sequence[float]) -> list[float]:
        """Return one's own numbers."""
        return list(numbers)

    def all_ranks(self, holds: bool) -> bool:
        """Return one's own answer."""
        return holds

    def all_gather_ints(self, record: Sequence[int]) -> list[list[int]]:
        """Return one's own record."""
        return [list(record)]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return one's own bytes."""
        return [data]

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Return one's own bytes."""
        return data


ALONE = Alone()


def digest(text: str) -> int:
    """Return 56 bits, which fit a record."""
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest())
