"""Lay batches out for passes: large enough to be quick, small enough for the memory that the loop needs.

A pass forth and back keeps what every layer makes of every example. The loop's own batch says what fits;
where examples are cheap, as many go together as make no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from esper.batches.examples import count_examples, join, split_batch
from esper.batches.layout import Batch, part, unflatten

TIMES = 4  # the loop's batch: its weights, gradients and optimizer state are there anyway
LEAST = 64
FREE = 2**24  # FLOPs of a pass that is never large: it makes fewer numbers than that


def largest(loop: int, flops: int) -> int:
    """Return how many examples may go through the model together.

    Args:
        loop: Number of examples in the loop's batch.
        flops: FLOPs of the model, forward, per example.
    """
    return max(TIMES * loop, LEAST, FREE // max(flops, 1))


def portions(batches: Sequence[Batch], most: int) -> Iterator[Batch]:
    """Join batches that are small and cut those that are large, evenly; the order of examples stays.

    A rest below a quarter of a portion goes with the one before it: statistics of a batch need examples.

    Args:
        batches: Batches whose examples count alone.
        most: Largest number of examples in a portion.
    """
    left = sum(map(count_examples, batches))
    even = math.ceil(left / math.ceil(left / most)) if left else most
    waiting, count = list[Batch](), 0
    for piece in (piece for batch in batches for piece in cut(batch, most)):
        size = count_examples(piece)
        full = count >= even or count + size > most
        if waiting and full and left - count >= most // 4:
            yield from join(waiting)
            waiting, left, count = list[Batch](), left - count, 0
        waiting.append(piece)
        count += size
    yield from join(waiting)


def cut(batch: Batch, most: int) -> Iterator[Batch]:
    """Cut a batch into even parts of so many examples at most; leaves without examples stay whole."""
    count = count_examples(batch)
    parts = math.ceil(count / most)
    if parts < 2:
        yield batch
        return
    leaves, batched, nest, count = split_batch(batch)
    for i in range(parts):
        rows = slice(i * count // parts, (i + 1) * count // parts)
        yield unflatten(
            [part(one, rows) if many else one for one, many in zip(leaves, batched, strict=True)], nest
        )
