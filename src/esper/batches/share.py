"""``Share``: this process's rows of every batch, for a loader that knows nothing of other processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Generic, TypeVar, cast

import numpy as np
from torch import Tensor

from esper.batches.layout import Leaf, flatten, rows, unflatten

Batch = TypeVar("Batch")


class Share(Generic[Batch]):
    """Goes through all batches and keeps every ``world``-th row, from ``rank`` on.

    All processes read the same batches, so a step sees what it would in one process, and another number of
    processes goes on at the same batch. Rows that cannot be dealt out evenly are left out. Where reading is
    what takes long, give each process a loader with a ``DistributedSampler`` instead.

    Args:
        batches: Batches that can be iterated again, in the same order in every process.
        rank: Number of this process, from 0.
        world: Number of processes.
    """

    def __init__(self, batches: Iterable[Batch], rank: int, world: int) -> None:
        self.batches = batches
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Batch]:
        """Hand out this process's rows."""
        for batch in self.batches:
            leaves, nest = flatten(batch)
            yield cast("Batch", unflatten([self.rows(leaf) for leaf in leaves], nest))

    def __len__(self) -> int:
        """Count the batches, if the loader knows."""
        return len(cast("Sized", self.batches))

    def rows(self, leaf: Leaf) -> Leaf:
        """Return this process's rows of a tensor, an array or a list; what has none is everybody's."""
        count = rows(leaf)
        if count is None or not isinstance(leaf, (Tensor, np.ndarray, list)):
            return leaf
        even = count // self.world * self.world
        return leaf[self.rank : even : self.world]
