"""``Share``: this process's rows of every batch, for a loader that knows nothing of other processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Generic, TypeVar, cast

from esper.batches.axes import Axes, BatchAxis
from esper.batches.layout import Leaf, flatten, part, rows, unflatten

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
        batch_axis: Axis of the examples, as for ``esper.grow``.
    """

    def __init__(
        self, batches: Iterable[Batch], rank: int, world: int, batch_axis: BatchAxis | None = None
    ) -> None:
        self.batches, self.axes = batches, Axes(batch_axis)
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Batch]:
        """Hand out this process's rows."""
        for batch in self.axes.begin(self.batches):
            leaves, nest = flatten(batch)
            dealt = self.axes.outward([self.rows(leaf) for leaf in leaves], nest)
            yield cast("Batch", unflatten(dealt, nest))

    def __len__(self) -> int:
        """Count the batches, if the loader knows."""
        return len(cast("Sized", self.batches))

    def rows(self, leaf: Leaf) -> Leaf:
        """Return this process's rows of a tensor, an array or a list; what has none is everybody's."""
        count = rows(leaf)
        if count is None:
            return leaf
        even = count // self.world * self.world
        return part(leaf, slice(self.rank, even, self.world))
