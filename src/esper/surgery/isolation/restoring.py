"""Give objects of the user's back what they held, and write only where something has changed.

By the methods of Python's own classes: what a user's class makes of them might raise, or count.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence, Set
from contextvars import ContextVar
from operator import is_
from types import MemberDescriptorType
from typing import TypeVar

import torch
from torch import Tensor

from esper.surgery.isolation.reach import is_data, is_own

MISSING = object()

Key = TypeVar("Key")


def alike(value: list[object], before: Sequence[object]) -> bool:
    """Tell whether two lists hold the same objects."""
    return list.__len__(value) == len(before) and all(map(is_, list.__iter__(value), before))


def items_of(value: dict[Key, object]) -> list[tuple[Key, object]]:
    """Return what a dict holds, in its order; an OrderedDict keeps one of its own."""
    return list(OrderedDict.items(value) if isinstance(value, OrderedDict) else dict.items(value))


def shortened(value: dict[Key, object], count: int) -> None:
    """Take out what was added to a long dict: it stands at its end."""
    if dict.__len__(value) > count:
        without(value, items_of(value)[count:])


def without(value: dict[Key, object], entries: Sequence[tuple[Key, object]]) -> None:
    """Take entries out of a dict."""
    for key, _ in entries:
        if isinstance(value, OrderedDict):
            OrderedDict.__delitem__(value, key)
        else:
            dict.__delitem__(value, key)


def restored_dict(value: dict[Key, object], before: Sequence[tuple[Key, object]]) -> None:
    """Give a dict its entries back, one by one where their order is the same: other threads may read it."""
    now = items_of(value)
    if len(now) >= len(before) and all(a is c for (a, _), (c, _) in zip(now, before, strict=False)):
        without(value, now[len(before) :])
        for (key, one), (_, held) in zip(before, now, strict=False):
            if one is not held:
                dict.__setitem__(value, key, one)  # of one that is there: its place stays
        return
    if isinstance(value, OrderedDict):  # it keeps an order of its own
        OrderedDict.clear(value)
        for key, one in before:
            OrderedDict.__setitem__(value, key, one)
        return
    dict.clear(value)  # not what a subclass makes of it
    dict.update(value, before)


def restored_set(value: set[object], before: set[object]) -> None:
    """Give a set its members back."""
    if value != before:
        set.clear(value)
        set.update(value, before)


def restored_deque(value: deque[object], before: Sequence[object]) -> None:
    """Give a deque its entries back."""
    if not alike(list(deque.__iter__(value)), before):
        deque.clear(value)
        deque.extend(value, before)


def restored_names(held: dict[str, object], before: Mapping[str, object], leave: Set[str]) -> None:
    """Give an object its attributes back, but for some."""
    for name in held.keys() - before.keys() - leave:
        del held[name]
    held.update(before)


def restored_class(kind: type, before: Mapping[str, object]) -> None:
    """Give a class its data back."""
    now = {name: value for name, value in vars(kind).items() if is_data(name, value)}
    for name in now.keys() - before.keys():
        type.__delattr__(kind, name)
    for name, value in before.items():
        if now.get(name, MISSING) is not value:
            type.__setattr__(kind, name, value)  # whatever its own class makes of that


def written(value: Tensor, before: Tensor) -> None:
    """Write a tensor's values back."""
    with torch.no_grad():
        value.copy_(before)


def attributes_of(value: object) -> dict[str, object] | None:
    """Return an object's table of attributes, whatever its class says of it."""
    try:
        held = object.__getattribute__(value, "__dict__")
    except Exception:  # none, or a property of the user's own
        return None
    return held if isinstance(held, dict) else None


def slots_of(kind: type) -> list[MemberDescriptorType]:
    """List the slots that classes of the user's have in place of a table, whatever stands before them."""
    return [
        one
        for base in kind.__mro__
        if is_own(base.__module__)
        for one in vars(base).values()
        if type(one) is MemberDescriptorType
    ]


def content_of(slot: MemberDescriptorType, value: object) -> object:
    """Return what an object holds in a slot."""
    try:
        return slot.__get__(value)
    except AttributeError:
        return MISSING


def restored_slot(slot: MemberDescriptorType, value: object, before: object) -> None:
    """Give an object back what it held in a slot."""
    if content_of(slot, value) is before:
        return
    if before is MISSING:
        slot.__delete__(value)
    else:
        slot.__set__(value, before)


def restored_variable(value: ContextVar[object], before: object) -> bool:
    """Give a variable its value back; tells whether it has it."""
    if value.get(MISSING) is not before and before is not MISSING:
        value.set(before)
    return value.get(MISSING) is before


def laid_alike(value: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors are the same numbers."""
    return (
        value.shape == other.shape
        and value.data_ptr() == other.data_ptr()
        and value.stride() == other.stride()
    )
