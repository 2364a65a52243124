"""A batch of smaller images or shorter sequences: sizes that a model may be free in, or not."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from esper.batches.examples import smaller, split_batch
from esper.batches.layout import Batch, Leaf, unflatten

IMAGE = 4  # axes of a batch of images; of volumes there are more


def trials(batch: Batch, fixed: Collection[int] = ()) -> tuple[list[Batch], list[Batch]]:
    """Return a batch of fewer examples, if there can be one, and such of another size, to be tried in order.

    Args:
        batch: One batch of the probe.
        fixed: Numbers of features that layers of the model take: an axis as long as that is not free.
    """
    few = smaller(batch)
    return few, list(crops(few[0] if few else batch, fixed))


def crops(batch: Batch, fixed: Collection[int]) -> Iterator[Batch]:
    """Cut images at both sides, first to the half; else cut one axis behind that of the examples."""
    leaves, batched, nest, _ = split_batch(batch)
    given = [i for i, leaf in enumerate(leaves) if batched[i] and isinstance(leaf, Tensor) and leaf.dim() > 1]
    if not given:
        return
    first = leaves[given[0]]
    if first.dim() >= IMAGE:
        axes = range(2, first.dim())
        for halved in (True, False):
            lengths = {size: size // 2 if halved else size - 1 for size in first.shape[2:]}
            if min(lengths.values()) > 0:
                made = [cut(leaf, lengths, 1) if dims(leaf) == IMAGE - 1 else leaf for leaf in leaves]
                made = [
                    along(leaf, axes, lengths) if isinstance(leaf, Tensor) and leaf.dim() >= IMAGE else leaf
                    for leaf in made
                ]
                yield unflatten(made, nest)
        return
    for axis in range(1, first.dim()):
        size = first.shape[axis]
        features = axis == first.dim() - 1 and first.is_floating_point() and size in fixed
        if size > 1 and not features:
            lengths = {size: size // 2}
            made = [cut(leaf, lengths, int(many)) for leaf, many in zip(leaves, batched, strict=True)]
            made[given[0]] = along(first, (axis,), lengths)
            yield unflatten(made, nest)


def dims(leaf: Leaf) -> int:
    """Count the axes of a tensor; 0 of what is none."""
    return leaf.dim() if isinstance(leaf, Tensor) else 0


def cut(leaf: Leaf, lengths: dict[int, int], begin: int) -> Leaf:
    """Shorten every axis from one on that has one of some sizes."""
    return along(leaf, range(begin, leaf.dim()), lengths) if isinstance(leaf, Tensor) else leaf


def along(leaf: Tensor, axes: Sequence[int], lengths: dict[int, int]) -> Tensor:
    """Shorten axes to the length given for their size."""
    for axis in axes:
        leaf = leaf.narrow(axis, 0, lengths.get(leaf.shape[axis], leaf.shape[axis]))
    return leaf
