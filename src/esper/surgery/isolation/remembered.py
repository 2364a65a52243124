"""Remember what objects of the user's hold, and put it back.

In place, so that whoever holds a list or an object sees it as it was. What is remembered is small: of a long
list or dict only its length, so that what was added goes; large tensors are not copied.
"""

from __future__ import annotations

import io
import queue
import random
import weakref
from argparse import Namespace
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Mapping, Sequence, Set
from operator import is_
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from esper.surgery.isolation.attributes import TORCHS
from esper.surgery.isolation.global_draws import alone
from esper.surgery.isolation.reach import is_data, is_own

DEEP = 4  # containers and objects within one another
MANY = 2048  # entries of a container, or numbers of a tensor, that are remembered
FEW = 256  # entries of a container that may hold containers
MOST = 512  # objects that are remembered at a call
MISSING = object()

Key = TypeVar("Key")
Undo: TypeAlias = Callable[[], object]
Way: TypeAlias = "Callable[[Memory, Any, int], None]"  # each of the methods below takes its own kind


class Memory:
    """Remembers what objects hold.

    Args:
        inside: Ids of what is looked after elsewhere: the model's modules.

    Attributes:
        lost: What cannot be put back, in words.
    """

    def __init__(self, inside: set[int]) -> None:
        self.seen = set(inside)
        self.undo: list[Undo] = []
        self.lost: list[str] = []
        self.left = MOST

    def take(self, value: object, depth: int = DEEP) -> None:
        """Remember one value, and what it holds."""
        kind = type(value)
        if kind not in REMEMBER:
            REMEMBER[kind] = way_of(kind)
        how = REMEMBER[kind]
        if how is None or depth == 0 or id(value) in self.seen:
            return
        self.left -= 1
        if self.left < 0:
            return
        self.seen.add(id(value))
        how(self, value, depth - 1)

    def takes(self, values: Sequence[object], depth: int) -> None:
        """Remember several, where they are not many."""
        if len(values) <= FEW:
            for value in values:
                if type(value) not in PLAIN:
                    self.take(value, depth)

    def put_back(self) -> None:
        """Undo what has changed, the latest that was remembered first."""
        for undo in reversed(self.undo):
            undo()

    def a_list(self, value: list[object], depth: int) -> None:
        """Remember a list."""
        count = list.__len__(value)  # what a subclass says of itself may raise
        if count > MANY:
            self.undo.append(lambda: list.__delitem__(value, slice(count, None)))
            return
        before = list.copy(value)
        self.undo.append(lambda: alike(value, before) or list.__setitem__(value, slice(None), before))
        self.takes(before, depth)

    def a_dict(self, value: dict[Key, object], depth: int) -> None:
        """Remember a dict, its order included."""
        count = dict.__len__(value)
        if count > MANY:
            self.undo.append(lambda: shortened(value, count))
            return
        before = list(dict.items(value))
        self.undo.append(lambda: restored_dict(value, before))
        self.takes([one for _, one in before], depth)

    def a_set(self, value: set[object], depth: int) -> None:
        """Remember a set."""
        before = set.copy(value)
        self.undo.append(lambda: restored_set(value, before))

    def a_deque(self, value: deque[object], depth: int) -> None:
        """Remember a deque."""
        before = list(deque.__iter__(value))
        self.undo.append(lambda: restored_deque(value, before))
        self.takes(before, depth)

    def a_bytearray(self, value: bytearray, depth: int) -> None:
        """Remember bytes."""
        before = bytes(memoryview(value))
        self.undo.append(lambda: value == before or value.__setitem__(slice(None), before))

    def a_tuple(self, value: tuple[object, ...], depth: int) -> None:
        """Remember what a tuple holds."""
        self.takes(list(tuple.__iter__(value)), depth)

    def a_tensor(self, value: Tensor, depth: int) -> None:
        """Remember a small tensor that no gradient is taken for."""
        usual = value.layout == torch.strided and not value.is_nested and not value.is_inference()
        if usual and not value.requires_grad and not value.is_meta:
            version = value._version
            if value.numel() > MANY:
                self.undo.append(lambda: value._version == version or self.lose(value))
                return
            before = value.detach().clone()
            self.undo.append(lambda: value._version == version or written(value, before))

    def lose(self, value: Tensor) -> None:
        """Note a tensor that was written to, and is too large to be copied at each call."""
        self.lost.append(f"a tensor of shape {tuple(value.shape)} that it writes to")

    def an_array(self, value: np.ndarray, depth: int) -> None:
        """Remember a small array."""
        if value.flags.writeable and value.size <= MANY:
            before = value.copy()
            self.undo.append(lambda: np.copyto(value, before))

    def a_generator(self, value: torch.Generator, depth: int) -> None:
        """Remember where a generator is."""
        state = value.get_state()
        self.undo.append(lambda: value.set_state(state))

    def numbers(self, value: np.random.Generator, depth: int) -> None:
        """Remember where a generator of numpy is."""
        bits = value.bit_generator
        state = bits.state
        self.undo.append(lambda: setattr(bits, "state", state))

    def old_numbers(self, value: np.random.RandomState, depth: int) -> None:
        """Remember where an old generator of numpy is."""
        state = value.get_state()
        self.undo.append(lambda: value.set_state(state))

    def python_numbers(self, value: random.Random, depth: int) -> None:
        """Remember where a generator of Python is."""
        state = value.getstate()
        self.undo.append(lambda: value.setstate(state))

    def a_module(self, value: nn.Module, depth: int) -> None:
        """Remember the attributes of a user's module outside the model; torch's keep none."""
        held = value.__dict__
        own = {name: one for name, one in held.items() if name not in TORCHS}
        self.undo.append(lambda: restored_names(held, own, TORCHS))
        self.takes([*own.values(), *value._buffers.values(), *value._modules.values()], depth)

    def an_object(self, value: object, depth: int) -> None:
        """Remember the attributes of an object."""
        held = attributes_of(value)
        if held is not None:
            self.a_dict(held, depth)
        for name in slots_of(type(value)):
            before = getattr(value, name, MISSING)
            self.undo.append(lambda name=name, before=before: attribute(value, name, before))
            self.take(before, depth)

    def attributes(self, value: object, depth: int) -> None:
        """Remember the attributes of an object of the user's, and nothing where it is torch's or a list."""
        if is_own(type(value).__module__) and type(value).__module__ != "builtins":
            held = attributes_of(value)
            if held is not None:
                self.a_dict(held, depth)

    def a_queue(self, value: queue.Queue[object], depth: int) -> None:
        """Remember a queue, unless other threads may fill it meanwhile."""
        if alone():
            self.a_dict(value.__dict__, depth)
        else:
            self.lost.append("a queue, which other threads may use meanwhile")

    def a_stream(self, value: object, depth: int) -> None:
        """Note what gives or takes each thing once."""
        if depth == DEEP - 1:  # it is named itself, not held by what is
            self.lost.append(f"a {type(value).__name__}")


def way_of(kind: type) -> Way | None:
    """Return how values of a class are remembered; None: they are not."""
    if issubclass(kind, type | ModuleType):
        return None
    for known, way in WAYS:
        if issubclass(kind, known):
            return way
    if issubclass(kind, nn.Module):
        return Memory.a_module if is_own(kind.__module__) else None
    if hasattr(kind, "__next__"):
        return Memory.a_stream
    return Memory.an_object if is_own(kind.__module__) and kind.__module__ != "builtins" else None


PLAIN = frozenset((int, float, bool, str, bytes, type(None), complex))
WAYS: tuple[tuple[type | tuple[type, ...], Way], ...] = (
    (list, Memory.a_list),
    (dict, Memory.a_dict),
    (set, Memory.a_set),
    (deque, Memory.a_deque),
    (bytearray, Memory.a_bytearray),
    (tuple, Memory.a_tuple),
    (nn.Parameter, lambda memory, value, depth: None),
    (Tensor, Memory.a_tensor),
    (np.ndarray, Memory.an_array),
    (torch.Generator, Memory.a_generator),
    (np.random.Generator, Memory.numbers),
    (np.random.RandomState, Memory.old_numbers),
    (random.Random, Memory.python_numbers),
    (queue.Queue, Memory.a_queue),
    ((SimpleNamespace, Namespace, UserDict, UserList), Memory.an_object),
    (io.IOBase, Memory.a_stream),
)
REMEMBER: weakref.WeakKeyDictionary[type, Way | None] = weakref.WeakKeyDictionary(dict.fromkeys(PLAIN))


def alike(value: list[object], before: Sequence[object]) -> bool:
    """Tell whether two lists hold the same objects."""
    return list.__len__(value) == len(before) and all(map(is_, list.__iter__(value), before))


def shortened(value: dict[Key, object], count: int) -> None:
    """Take out what was added to a long dict: it stands at its end."""
    for key in list(dict.__iter__(value))[count:]:
        dict.__delitem__(value, key)


def restored_dict(value: dict[Key, object], before: Sequence[tuple[Key, object]]) -> None:
    """Give a dict its entries back."""
    now = list(dict.items(value))
    if len(now) == len(before) and all(a is c and b is d for (a, b), (c, d) in zip(now, before, strict=True)):
        return
    if isinstance(value, OrderedDict):  # it keeps an order of its own
        OrderedDict.clear(value)
        OrderedDict.update(value, before)
        return
    dict.clear(value)  # not what a subclass makes of it
    dict.update(value, before)


def restored_set(value: set[object], before: set[object]) -> None:
    """Give a set its members back."""
    if set.__ne__(value, before):
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
        delattr(kind, name)
    for name, value in before.items():
        if now.get(name, MISSING) is not value:
            setattr(kind, name, value)


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


def slots_of(kind: type) -> list[str]:
    """List the slots that a class has in place of a table."""
    found: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        found += [slots] if isinstance(slots, str) else slots
    return [name for name in found if name not in ("__dict__", "__weakref__")]


def attribute(value: object, name: str, before: object) -> None:
    """Give an object one attribute back."""
    if getattr(value, name, MISSING) is before:
        return
    if before is MISSING:
        object.__delattr__(value, name)
    else:
        object.__setattr__(value, name, before)
