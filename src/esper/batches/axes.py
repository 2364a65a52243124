"""Which axis of a batch's tensors is that of its examples: declared, or shown at the start, never guessed.

Behind the door examples lie along axis 0. Where a user's tensors have them elsewhere, time before batch say,
they are turned as they come in (views, no copies) and turned back for every call of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from esper.arguments import items, whole
from esper.batches.heldout import Turned, first
from esper.batches.layout import Batch, Layout, Leaf, facts_of, flatten, is_record, rows, unflatten
from esper.errors import ConfigError, ProbeError
from esper.printable import quoted

BatchAxis: TypeAlias = "int | Sequence[BatchAxis] | Mapping[str, BatchAxis]"
Along: TypeAlias = tuple[int | None, ...]  # axis of the examples, leaf by leaf; None: it has none
MOST_AXES = 16
NEAR = 1e-4  # relative, by which losses of one batch may differ
IMAGES = 4  # axes of a batch of images: torch's layers take channels next to examples


class Axes:
    """Turns the batches of one run.

    Args:
        declared: The axis in all tensors, or one for each part of a batch in its nest; None: not said.

    Attributes:
        said: What is told at the start of an axis that nobody declared.
        turns: Whether examples lie elsewhere than along axis 0.
    """

    def __init__(self, declared: BatchAxis | None = None) -> None:
        refuse_axis(declared)
        self.declared = declared
        self.known: list[tuple[Layout, Along]] = []
        self.said: list[str] = []
        self.turns = False

    def begin(self, probe: Iterable[Batch]) -> Iterable[Batch]:
        """Return the probe as it is read from here on, where an axis was declared.

        Raises:
            ProbeError: The axis does not fit the first batch.
        """
        if self.declared is None:
            return probe
        for batch in first(probe, 1):
            leaves, nest = flatten(batch)
            self.turns = any(self.along(batch, leaves, nest))
        return Turned(probe, self.inward) if self.turns else probe

    def settle(self, batch: Batch, run: Callable[[Batch], float]) -> bool:
        """Show along which axis examples lie where nobody said so and it might be the second.

        Args:
            batch: First of the probe.
            run: Takes the loss of a batch, the same for the same one.

        Returns:
            Whether it is the second: batches have to be turned from here on.
        """
        self.said.clear()
        if self.declared is not None or self.turns:
            return False
        leaves, nest = flatten(batch)
        ways = time_first(leaves)
        if ways is None:
            return False
        found, second = shown(batch, ways, run), ways[1]
        if found == 1:
            self.known.append((nest, second))
            self.turns, self.declared = True, 1
            self.said.append(
                f"examples lie along axis 1 of the batches, {counted(leaves, second)} of them in the first: "
                "the losses of parts of it show that; batch_axis=1 says so, batch_axis=0 otherwise"
            )
        elif found is None:
            self.said.append(
                "it cannot be told whether examples lie along axis 0 of the batches or axis 1, where time "
                f"comes first; axis 0 is taken, {counted(leaves, ways[0])} of them in the first: "
                "batch_axis=0 says so, batch_axis=1 otherwise"
            )
        return self.turns

    def inward(self, batch: Batch) -> Batch:
        """Return a user's batch with its examples along axis 0."""
        if not self.turns:
            return batch
        leaves, nest = flatten(batch)
        along = self.along(batch, leaves, nest)
        return unflatten([moved(one, axis, 0) for one, axis in zip(leaves, along, strict=True)], nest)

    def outward(self, leaves: list[Leaf], nest: Layout) -> list[Leaf]:
        """Return the leaves of a batch as the user's code knows them."""
        if not self.turns:
            return leaves
        along = next((axes for layout, axes in self.known if layout == nest), None)
        if along is None:
            raise ProbeError("batch_axis: a batch is laid out otherwise than every batch before it")
        return [moved(one, 0, axis) for one, axis in zip(leaves, along, strict=True)]

    def along(self, batch: Batch, leaves: Sequence[Leaf], nest: Layout) -> Along:
        """Return the axes of a batch; those of one laid out alike are taken for it."""
        for layout, axes in self.known:
            if layout == nest and all(fits(one, axis) for one, axis in zip(leaves, axes, strict=True)):
                return axes
        assert self.declared is not None
        declared = self.declared
        found = by_size(leaves, declared) if isinstance(declared, int) else by_part(batch, declared)
        if len(found) != len(leaves) or not all(map(fits, leaves, found)):
            raise ProbeError(
                f"batch_axis={quoted(declared)} does not fit a batch with tensors of shape "
                f"{[tuple(one.shape) for one in leaves if isinstance(one, Tensor | np.ndarray)]}; give the "
                "axis of the examples, or one for each part of a batch, as a tuple or by name"
            )
        self.known.append((nest, found))
        return found


def refuse_axis(declared: object, depth: int = MOST_AXES) -> None:
    """Refuse what is no axis, and no nest of axes.

    Raises:
        ConfigError: With what was given.
    """
    if declared is None and depth == MOST_AXES:
        return
    if isinstance(declared, Mapping) and depth:
        if not declared or not all(isinstance(name, str) for name in declared):
            raise ConfigError(f"batch_axis={quoted(declared)}; give axes by the names of a batch's parts")
        for part in declared.values():
            refuse_axis(part, depth - 1)
    elif isinstance(declared, (tuple, list)) and declared and depth:
        for part in items("batch_axis", declared):
            refuse_axis(part, depth - 1)
    else:
        whole("batch_axis", declared, least=0, most=MOST_AXES)


def dims(leaf: Leaf) -> int:
    """Count the axes of a tensor or array; 0 of what is none."""
    return leaf.ndim if isinstance(leaf, Tensor | np.ndarray) else 0


def fits(leaf: Leaf, axis: int | None) -> bool:
    """Tell whether a leaf has an axis."""
    return not axis or dims(leaf) > axis


def moved(leaf: Leaf, source: int | None, target: int | None) -> Leaf:
    """Return a view of a leaf with one axis elsewhere."""
    if not source and not target:
        return leaf
    if isinstance(leaf, Tensor):
        return leaf.movedim(source or 0, target or 0)
    return np.moveaxis(leaf, source or 0, target or 0) if isinstance(leaf, np.ndarray) else leaf


def by_size(leaves: Sequence[Leaf], axis: int) -> Along:
    """Return the axes where one number was declared: it holds where a tensor is as long there as the first.

    A tensor that is not, of targets (batch,) say, has its examples along axis 0.
    """
    lengths = [
        leaf.shape[axis] for leaf in leaves if isinstance(leaf, Tensor | np.ndarray) and dims(leaf) > axis
    ]
    if not lengths:
        return (MOST_AXES,) * len(leaves)  # fits none
    count = lengths[0]
    return tuple(
        axis
        if isinstance(leaf, Tensor | np.ndarray) and dims(leaf) > axis and leaf.shape[axis] == count
        else (0 if rows(leaf) == count else None)
        for leaf in leaves
    )


def by_part(batch: Batch, declared: BatchAxis) -> Along:
    """Return the axes where they were declared part by part; what is not named has axis 0.

    Raises:
        ProbeError: The parts are not those of the batch.
    """
    if isinstance(declared, int):
        return (declared,) * len(flatten(batch)[0])
    if isinstance(declared, Mapping):
        parts = facts_of(batch) if isinstance(batch, Mapping) or is_record(batch) else {}
        if unknown := [name for name in declared if name not in parts]:
            raise ProbeError(
                f"batch_axis names {quoted(unknown[0])}; a batch has {', '.join(map(str, parts))}"
            )
        nested = [by_part(part, declared.get(name, 0)) for name, part in parts.items()]
    elif isinstance(batch, (tuple, list)) and len(batch) == len(declared):
        nested = [by_part(part, axis) for part, axis in zip(batch, declared, strict=True)]
    else:
        found = (
            f"{type(batch).__name__} of {len(batch)}"
            if isinstance(batch, (tuple, list))
            else type(batch).__name__
        )
        raise ProbeError(f"batch_axis has {len(declared)} parts, and a batch is a {found}")
    return tuple(axis for part in nested for axis in part)


def counted(leaves: Sequence[Leaf], along: Along) -> int:
    """Count the examples."""
    return next(
        leaf.shape[axis]
        for leaf, axis in zip(leaves, along, strict=True)
        if axis is not None and isinstance(leaf, Tensor | np.ndarray)
    )


def time_first(leaves: Sequence[Leaf]) -> tuple[Along, Along] | None:
    """Return the axes of a batch's examples where batch comes first, and where time does; None: it cannot.

    Sequences are tables of tokens, (time, batch), or of features, (time, batch, features). What is as long
    as they are along axis 0 would have to be so along axis 1 too, or have the length of that along axis 0.
    """
    lead = next((one for one in leaves if rows(one) is not None), None)
    if not isinstance(lead, Tensor) or lead.is_nested or lead.layout != torch.strided:
        return None
    words = not lead.is_floating_point() and not lead.is_complex()
    if lead.dim() == IMAGES or lead.dim() < (2 if words else 3) or min(lead.shape[:2]) < 2:
        return None
    first_axis: Along = tuple(0 if rows(leaf) == lead.shape[0] else None for leaf in leaves)
    second = by_size(leaves, 1)
    return (first_axis, second) if held(second) >= held(first_axis) else None


def held(along: Along) -> int:
    """Count the leaves that hold examples."""
    return sum(axis is not None for axis in along)


def shown(batch: Batch, ways: Sequence[Along], run: Callable[[Batch], float]) -> int | None:
    """Return which of two ways a loss takes examples to lie; None where neither or both may be.

    A mean or sum of what examples lose is that of its halves; where they are coupled, their order at least
    says nothing. Neither holds along time, but for models that look at each moment alone.
    """
    loss = tried(run, batch)
    adds = [of_halves(batch, along, loss, run) for along in ways]
    if all(adds):  # each moment counts alone: more tensors have a row for each example, or nothing tells
        return 1 if held(ways[1]) > held(ways[0]) else None
    if any(adds):
        return adds.index(True)
    stays = [same(loss, tried(run, changed(batch, along, rolled))) for along in ways]
    return stays.index(True) if sum(stays) == 1 else None


def of_halves(batch: Batch, along: Along, loss: float, run: Callable[[Batch], float]) -> bool:
    """Tell whether a loss is the mean or the sum of those of two halves of a batch."""
    count = counted(flatten(batch)[0], along)
    half = count // 2
    before, after = (
        tried(run, changed(batch, along, lambda leaf, axis, b=begin, n=size: leaf.narrow(axis, b, n)))
        for begin, size in ((0, half), (half, count - half))
    )
    return same(loss, (half * before + (count - half) * after) / count) or same(loss, before + after)


def changed(batch: Batch, along: Along, change: Callable[[Tensor, int], Tensor]) -> Batch:
    """Return a batch with its tensors of examples changed."""
    leaves, nest = flatten(batch)
    made: list[Leaf] = []
    for leaf, axis in zip(leaves, along, strict=True):
        if axis is None:
            made.append(leaf)
        elif isinstance(leaf, np.ndarray):
            made.append(change(torch.as_tensor(leaf), axis).numpy())
        else:
            assert isinstance(leaf, Tensor)
            made.append(change(leaf, axis))
    return unflatten(made, nest)


def rolled(leaf: Tensor, axis: int) -> Tensor:
    """Begin with another example."""
    return leaf.roll(max(leaf.shape[axis] // 3, 1), axis)


def tried(run: Callable[[Batch], float], batch: Batch) -> float:
    """Take the loss of a batch that the user's code may not take; NaN then."""
    try:
        return run(batch)
    except Exception:  # it is the user's code that runs here: it raises what it likes
        return math.nan


def same(one: float, other: float) -> bool:
    """Tell whether two losses are one, but for rounding."""
    return abs(one - other) <= NEAR * max(abs(one), abs(other))  # of NaN it is none
