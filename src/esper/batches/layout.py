"""How a batch is laid out: its leaves, and the way back to a batch from them.

torch's pytree takes tuples, lists and dicts apart. Batches come as dataclasses and as mappings of other kinds
too (``UserDict``, which tokenizers return), and a list of labels is one leaf with an entry per example; so is
one of tensors where each is an example's own, as sequences of unlike length are.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import NamedTuple, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from esper.batches import packed
from esper.errors import ProbeError

Batch: TypeAlias = object  # what a loader yields: nothing is assumed of it but that leaves are found in it
Leaf: TypeAlias = object  # of a batch: a tensor, an array, a list with an entry per example, or anything else

PLAIN = (bool, int, float, str)  # what a list of labels or texts holds
ARRAYS = (Tensor, np.ndarray)
PARTS = 4  # of a batch that is a list: inputs, targets, a mask; of more that are alike, each is an example


def rows(leaf: Leaf) -> int | None:
    """Count a leaf's entries along its first axis; None where it has none."""
    if isinstance(leaf, Tensor):
        return leaf.size(0) if leaf.dim() > 0 else None  # a nested tensor has no shape
    if isinstance(leaf, np.ndarray):
        return leaf.shape[0] if leaf.ndim > 0 else None
    if isinstance(leaf, PackedSequence):
        return packed.count(leaf)
    return len(leaf) if isinstance(leaf, list) or type(leaf) is tuple else None  # others are taken apart


def is_list(value: object) -> TypeGuard[list[object]]:
    """Tell whether a value is a list of labels or texts."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, PLAIN) for one in value)


def is_whole(value: object) -> bool:
    """Tell what is one leaf though torch would take it apart."""
    return is_list(value) or isinstance(value, PackedSequence)


def is_record(value: object) -> bool:
    """Tell whether a value is a mapping or dataclass that pytree does not take apart."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return True
    return isinstance(value, MutableMapping) and type(value).__module__ != "builtins"


def is_series(value: object, examples: int | None = None) -> TypeGuard[list[object]]:
    """Tell a list with something of every example: tensors of unlike shape, or as many as there are examples.

    Args:
        value: A part of a batch.
        examples: Number of examples that another part of the batch has; None where none tells.
    """
    if not isinstance(value, list) or len(value) < 2:
        return False
    if not all(isinstance(one, Tensor) for one in value):
        return len(value) == examples and (opaque(value) or all(isinstance(one, Mapping) for one in value))
    shapes = {one.shape for one in value}
    if len({(one.dtype, one.dim()) for one in value}) > 1:
        return False
    return len(shapes) > 1 or (len(value) == examples and value[0].shape[:1] != (examples,))


def opaque(value: list[object]) -> bool:
    """Tell a list of one kind of objects that are taken apart no further, images say."""
    kinds = {type(one) for one in value}
    nests = (list, tuple, dict, np.ndarray, Tensor, *PLAIN, type(None))
    return len(kinds) == 1 and not isinstance(value[0], nests) and not is_record(value[0])


def is_collected(batch: object) -> TypeGuard[list[object]]:
    """Tell a batch that is a list of its examples, pairs, mappings or objects, as they were collected.

    A list as short as one of a batch's parts may be such a list of parts, unless each member has a number of
    its own, a label say; so may one whose members are batches themselves, their tensors all equally long.
    Objects that nothing is known of are examples.
    """
    if isinstance(batch, list) and batch and opaque(batch):
        return True
    members = members_of(batch)
    if not members or not members[0] or not isinstance(batch, (tuple, list)):
        return False
    if len(batch) <= PARTS:
        shapes = {tuple(getattr(part, "ndim", None) for part in member) for member in members}
        return isinstance(batch, list) and len(shapes) == 1 and all(any(map(alone, one)) for one in members)
    loose = isinstance(batch, tuple) or any(isinstance(one, list) for one in batch)
    if loose and not all(any(isinstance(part, ARRAYS) for part in member) for member in members):
        return False  # columns of labels, say
    lengths = {rows(part) for member in members for part in member}
    return len(lengths) > 1 or None in lengths


def members_of(batch: object) -> list[list[object]]:
    """Return what each of several collected examples holds; nothing where they are none, or not alike."""
    if (type(batch) is not tuple and not isinstance(batch, list)) or len(batch) < 2:
        return []
    if all(isinstance(one, Mapping) for one in batch):
        shared = set(batch[0]).intersection(*batch)  # some may say more than others
        return [[one[name] for name in batch[0] if name in shared] for one in batch]
    if all(isinstance(one, (tuple, list)) for one in batch):
        return [list(one) for one in batch] if len({tuple(map(type, one)) for one in batch}) == 1 else []
    return []


def alone(part: object) -> bool:
    """Tell one number or text, or a tensor of one."""
    return isinstance(part, (*PLAIN, np.generic)) or (isinstance(part, ARRAYS) and part.ndim == 0)


def is_zipped(batch: object) -> bool:
    """Tell a batch of tuples with an entry for each example, as ``tuple(zip(*examples))`` makes them.

    Where all tensors are equally long and nothing else tells, each may hold all examples.
    """
    if type(batch) is not tuple or not 2 <= len(batch) <= PARTS:
        return False
    if (
        not all(type(part) is tuple and len(part) > 1 for part in batch)
        or len({len(part) for part in batch}) > 1
    ):
        return False
    if any(len({type(one) for one in part}) > 1 for part in batch):
        return False
    if any(isinstance(part[0], Mapping) or alone(part[0]) for part in batch):
        return True
    arrays = [one for part in batch for one in part if isinstance(one, ARRAYS)]
    return len(arrays) > PARTS and len({rows(one) for one in arrays}) > 1


def series_in(batch: Batch) -> Callable[[object], bool]:
    """Return what tells the lists in a batch that have something of every example.

    It does not hold the batch: torch's walk leaves what it was given in a cycle, and a batch may be large.
    """
    own = id(batch)
    if is_collected(batch) or (is_series(batch) and len(batch) > PARTS):
        return lambda one: id(one) == own
    if is_zipped(batch):
        columns = set(map(id, batch)) if isinstance(batch, tuple) else set()
        return lambda one: id(one) in columns
    parts = list(batch.values()) if isinstance(batch, dict) else batch
    parts = parts if isinstance(parts, (tuple, list)) else []
    plain = [rows(one) for one in parts if isinstance(one, Tensor | np.ndarray) or is_list(one)]
    lists = [len(one) for one in parts if is_series(one)]
    lists += [len(one) for one in parts if isinstance(one, list) and one and isinstance(one[0], Mapping)]
    examples = next(iter([*plain, *lists]), None)
    return lambda one: id(one) != own and is_series(one, examples)


def flatten(batch: Batch) -> tuple[list[Leaf], Layout]:
    """Take a batch apart; the second value compares equal for batches that are laid out alike.

    Raises:
        ProbeError: It is nested in itself, or does not let itself be read.
    """
    try:
        series = series_in(batch)
        tops, nest = tree_flatten(batch, is_leaf=lambda one: is_whole(one) or is_record(one) or series(one))
        facts = [facts_of(top) if is_record(top) else None for top in tops]
    except RecursionError:
        raise ProbeError(
            f"a batch, a {type(batch).__name__}, is nested in itself, or deeper than Python follows; give "
            "tensors, and lists, tuples, mappings or dataclasses of them"
        ) from None
    except Exception as error:  # it is the methods of the user's own containers that run here
        raise unreadable(batch, error) from error
    leaves: list[Leaf] = []
    inner: list[Below | None] = []
    for top, held in zip(tops, facts, strict=True):
        if held is not None:
            within, below = flatten(tuple(held.values()) or None)
            leaves += within
            inner.append(Below(Record(top), tuple(held), below, len(within)))
        else:
            leaves.append(top)
            inner.append(None)
    return leaves, Layout(nest, tuple(inner))


def unreadable(batch: Batch, error: Exception) -> ProbeError:
    """Say that a batch does not let itself be read."""
    return ProbeError(
        f"a batch, a {type(batch).__name__}, cannot be taken apart: {type(error).__name__}: {error}; give "
        "tensors, and lists, tuples, mappings or dataclasses of them"
    )


def unflatten(leaves: Sequence[Leaf], layout: Layout) -> Batch:
    """Put a batch together."""
    nest, inner = layout
    tops: list[object] = []
    at = 0
    for one in inner:
        if one is None:
            tops.append(leaves[at])
            at += 1
            continue
        record, names, below, count = one
        values = unflatten(leaves[at : at + count], below)
        at += count
        tops.append(record.filled(dict(zip(names, values if isinstance(values, tuple) else (), strict=True))))
    return tree_unflatten(tops, nest)


def facts_of(record: object) -> dict[str, object]:
    """Return what a mapping or dataclass holds."""
    if isinstance(record, Mapping):
        return dict(record)
    assert dataclasses.is_dataclass(record)
    return {fact.name: getattr(record, fact.name) for fact in dataclasses.fields(record)}


class Record:
    """One mapping or dataclass, as a template for others of its kind; equal to every other of its class."""

    def __init__(self, like: object) -> None:
        self.like = like

    def __eq__(self, other: object) -> bool:
        """Compare classes."""
        return isinstance(other, Record) and type(self.like) is type(other.like)

    def __hash__(self) -> int:
        """Hash the class."""
        return hash(type(self.like))

    def filled(self, facts: Mapping[str, object]) -> object:
        """Return a copy that holds other values."""
        made = copy.copy(self.like)
        for name, value in facts.items():
            if isinstance(made, MutableMapping):
                made[name] = value
            else:
                object.__setattr__(made, name, value)
        return made


def chosen(leaf: Leaf, which: Tensor) -> Leaf:
    """Return some entries of a leaf that has them, in the order given."""
    if isinstance(leaf, Tensor):
        return leaf[which.to(leaf.device)]
    if isinstance(leaf, np.ndarray):
        return leaf[which.cpu().numpy()]
    if isinstance(leaf, PackedSequence):
        return packed.taken(leaf, which)
    assert isinstance(leaf, (list, tuple))
    return type(leaf)(leaf[i] for i in which.tolist())


def part(leaf: Leaf, which: slice) -> Leaf:
    """Return entries of a leaf that has them, one behind the other: a view of a tensor."""
    if isinstance(leaf, PackedSequence):
        return packed.taken(leaf, torch.arange(packed.count(leaf))[which])
    assert isinstance(leaf, (Tensor, np.ndarray, list, tuple))
    return leaf[which]


class Below(NamedTuple):
    """One mapping or dataclass within a batch.

    Attributes:
        record: Template of its kind.
        names: Names of what it holds.
        layout: Layout of the leaves below it.
        count: Number of leaves below it.
    """

    record: Record
    names: tuple[str, ...]
    layout: Layout
    count: int


class Layout(NamedTuple):
    """The way back from leaves to a batch; equal for batches that are laid out alike.

    Attributes:
        nest: torch's own account of tuples, lists and dicts.
        inner: Record that each of its leaves is; None for a plain leaf.
    """

    nest: TreeSpec
    inner: tuple[Below | None, ...]
