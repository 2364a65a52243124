"""How a batch is laid out: its leaves, and the way back to a batch from them.

torch's pytree takes tuples, lists and dicts apart. Batches come as dataclasses and as mappings of other kinds
too (``UserDict``, which tokenizers return), and a list of labels is one leaf with an entry per example; so is
one of tensors where each is an example's own, as sequences of unlike length are.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

PLAIN = (bool, int, float, str)  # what a list of labels or texts holds
PARTS = 4  # of a batch that is a list: inputs, targets, a mask; of more that are alike, each is an example


def rows(leaf: Any) -> int | None:
    """Count a leaf's entries along its first axis; None where it has none."""
    if isinstance(leaf, Tensor):
        return leaf.size(0) if leaf.dim() > 0 else None  # a nested tensor has no shape
    if isinstance(leaf, np.ndarray):
        return leaf.shape[0] if leaf.ndim > 0 else None
    return len(leaf) if isinstance(leaf, list) else None  # others are taken apart


def is_list(value: Any) -> bool:
    """Tell whether a value is a list of labels or texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, PLAIN) for one in value)


def is_record(value: Any) -> bool:
    """Tell whether a value is a mapping or dataclass that pytree does not take apart."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return True
    return isinstance(value, MutableMapping) and type(value).__module__ != "builtins"


def is_series(value: Any, examples: int | None = None) -> bool:
    """Tell a list with something of every example: tensors of unlike shape, or as many as there are examples.

    Args:
        value: Anything.
        examples: As many as another part of the batch has; None where none tells.
    """
    if not isinstance(value, list) or len(value) < 2:
        return False
    if not all(isinstance(one, Tensor) for one in value):
        return len(value) == examples and all(isinstance(one, Mapping) for one in value)
    shapes = {one.shape for one in value}
    if len({(one.dtype, one.dim()) for one in value}) > 1:
        return False
    return len(shapes) > 1 or (len(value) == examples and value[0].shape[:1] != (examples,))


def series_in(batch: Any) -> Callable[[Any], bool]:
    """Return what tells the lists in a batch that have something of every example."""
    if is_series(batch) and len(batch) > PARTS:
        return lambda one: one is batch
    parts = list(batch.values()) if isinstance(batch, dict) else batch
    parts = parts if isinstance(parts, (tuple, list)) else []
    plain = [rows(one) for one in parts if isinstance(one, Tensor | np.ndarray) or is_list(one)]
    lists = [len(one) for one in parts if is_series(one)]
    lists += [len(one) for one in parts if isinstance(one, list) and one and isinstance(one[0], Mapping)]
    examples = next(iter([*plain, *lists]), None)
    return lambda one: one is not batch and is_series(one, examples)


def flatten(batch: Any) -> tuple[list[Any], Any]:
    """Take a batch apart; the second value compares equal for batches that are laid out alike."""
    series = series_in(batch)
    tops, nest = tree_flatten(batch, is_leaf=lambda one: is_list(one) or is_record(one) or series(one))
    leaves: list[Any] = []
    inner: list[Any] = []
    for top in tops:
        if is_record(top):
            facts = facts_of(top)
            within, below = flatten(tuple(facts.values()) or None)
            leaves += within
            inner.append((Record(top), tuple(facts), below, len(within)))
        else:
            leaves.append(top)
            inner.append(None)
    return leaves, (nest, tuple(inner))


def unflatten(leaves: list[Any], layout: Any) -> Any:
    """Put a batch together."""
    nest, inner = layout
    tops: list[Any] = []
    at = 0
    for one in inner:
        if one is None:
            tops.append(leaves[at])
            at += 1
            continue
        record, names, below, count = one
        values = unflatten(leaves[at : at + count], below) or ()
        at += count
        tops.append(record.filled(dict(zip(names, values, strict=True))))
    return tree_unflatten(tops, nest)


def facts_of(record: Any) -> dict[str, Any]:
    """Return what a mapping or dataclass holds."""
    if isinstance(record, Mapping):
        return dict(record)
    return {fact.name: getattr(record, fact.name) for fact in dataclasses.fields(record)}


class Record:
    """One mapping or dataclass, as a template for others of its kind; equal to every other of its class."""

    def __init__(self, like: Any) -> None:
        self.like = like

    def __eq__(self, other: object) -> bool:
        """Compare classes."""
        return isinstance(other, Record) and type(self.like) is type(other.like)

    def __hash__(self) -> int:
        """Hash the class."""
        return hash(type(self.like))

    def filled(self, facts: Mapping[str, Any]) -> Any:
        """Return a copy that holds other values."""
        made = copy.copy(self.like)
        for name, value in facts.items():
            if isinstance(made, MutableMapping):
                made[name] = value
            else:
                object.__setattr__(made, name, value)
        return made


def chosen(leaf: Any, which: Tensor) -> Any:
    """Return some entries of a leaf, in the order given."""
    if isinstance(leaf, Tensor):
        return leaf[which.to(leaf.device)]
    if isinstance(leaf, np.ndarray):
        return leaf[which.cpu().numpy()]
    return [leaf[i] for i in which.tolist()]


def joined(leaves: list[Any]) -> Any:
    """Return leaves one behind the other."""
    if isinstance(leaves[0], Tensor):
        return torch.cat(leaves)
    if isinstance(leaves[0], np.ndarray):
        return np.concatenate(leaves)
    return [one for leaf in leaves for one in leaf]
