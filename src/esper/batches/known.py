"""Was a held-out example trained on? Told by what it holds, not by where it came from.

Each example is known by a digest over all its tensors, a sample of their entries. Two examples of a few small
numbers may be equal by chance, so only examples that carry more than that count. What is augmented comes with
other numbers every time, and is not found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from esper.batches import packed
from esper.batches.examples import split_batch
from esper.batches.layout import PLAIN, Batch, Leaf, flatten

SHARE = 0.5  # of the held-out examples, above which they say nothing of others
DISTINCT = 0.5  # of them that differ: of fewer kinds than that there are few
BITS = 32  # an example must carry: 1,024 among 1,024 are equal by chance once in 4,000 times
UNIQUE = 20  # bits of an entry that hardly any other is equal to
NUMBERS = "biufc"  # kinds of arrays that torch takes
ENTRIES = 512  # of each tensor of an example


class Known:
    """The training examples that events have read."""

    def __init__(self) -> None:
        self.digests: set[int] = set()

    def learn(self, batches: Iterable[Batch]) -> None:
        """Note training examples."""
        for batch in batches:
            self.digests.update(digests(rows_of(batch)))

    def most_of(self, batches: Sequence[Batch]) -> bool:
        """Tell whether most held-out examples are known, and carry enough for that to be no accident."""
        rows = [rows_of(batch) for batch in batches]
        found = [one for some in rows for one in digests(some)]
        known = sum(one in self.digests for one in found)
        if known <= SHARE * len(found) or len(set(found)) < DISTINCT * len(found):
            return False
        return min(map(information, rows)) >= BITS


def rows_of(batch: Batch) -> list[np.ndarray]:
    """Return a batch's leaves, each (examples, entries), at most so many entries of each example."""
    leaves, batched, _, count = split_batch(batch)
    return [entries(leaf, count) for leaf, many in zip(leaves, batched, strict=True) if many]


def entries(leaf: Leaf, count: int) -> np.ndarray:
    """Return entries of every example from all over a leaf, as whole numbers that tell them apart."""
    if isinstance(leaf, PackedSequence):
        leaf = packed.sequences(leaf)
    many = isinstance(leaf, (list, tuple)) or (
        isinstance(leaf, np.ndarray) and leaf.dtype.kind not in NUMBERS
    )
    if many and isinstance(leaf, Iterable):
        return np.array([[mark(one)] for one in leaf])
    flat = torch.as_tensor(leaf).detach().reshape(count, -1)
    few = flat[:, :: math.ceil(max(flat.shape[1], 1) / ENTRIES)].cpu()
    if few.is_complex():
        few = torch.view_as_real(few).flatten(1)
    if few.is_floating_point():
        return few.double().contiguous().view(torch.int64).numpy()
    return few.long().numpy()


def mark(value: object) -> int:
    """Return a number for what one example is in a list: a label, a text, a sequence, a table of them."""
    if isinstance(value, Tensor):
        return hash((tuple(value.shape), entries(value[None], 1).tobytes()))
    if isinstance(value, PLAIN):
        return hash(value)
    parts = flatten(value)[0]
    if any(one is value for one in parts):  # nothing is known of what it holds
        return 0
    return hash(tuple(mark(one) for one in parts))


def digests(rows: Sequence[np.ndarray]) -> list[int]:
    """Return a number for each example."""
    return [hash(one.tobytes()) for one in np.ascontiguousarray(np.concatenate(rows, 1))]


def information(rows: Sequence[np.ndarray]) -> float:
    """Return how many bits an example carries at most: those of the values that its entries take."""
    kinds = [(one, len(np.unique(one))) for one in rows if one.size]
    return sum(
        one.shape[1] * (UNIQUE if kind >= DISTINCT * one.size else math.log2(kind)) for one, kind in kinds
    )
