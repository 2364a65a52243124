"""Remember what objects of the user's hold, and put it back.

In place, so that whoever holds a list or an object sees it as it was. What is remembered is small: of a long
list or dict only its length, so that what was added goes; large tensors are not copied.
"""

from __future__ import annotations

import io
import queue
import random
import threading
import weakref
from argparse import Namespace
from array import array
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from esper.surgery.isolation.attributes import TORCHS
from esper.surgery.isolation.global_draws import alone
from esper.surgery.isolation.reach import is_own
from esper.surgery.isolation.restoring import (
    MISSING,
    alike,
    attributes_of,
    content_of,
    items_of,
    laid_alike,
    restored_deque,
    restored_dict,
    restored_names,
    restored_set,
    restored_slot,
    restored_variable,
    shortened,
    slots_of,
    written,
)

DEEP = 4  # containers and objects within one another
MANY = 2048  # entries of a container, or numbers of a tensor, that are remembered
FEW = 256  # entries of a container that may hold containers
MOST = 512  # objects that are remembered at a call
# Entries of a set or deque, of which additions cannot be told from the rest; of all together twice as many.
LONG = 2**16

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
        self.entries = 2 * LONG

    def take(self, value: object, depth: int = DEEP) -> None:
        """Remember one value, and what it holds."""
        if depth == 0 or id(value) in self.seen:
            return
        try:
            kind = type(value)
            if kind not in REMEMBER:
                REMEMBER[kind] = way_of(kind)
            how = REMEMBER[kind]
            if how is None or self.left <= 0:
                return
            self.left -= 1
            self.seen.add(id(value))
            how(self, value, depth - 1)
        except Exception:  # a class of the user's may raise whatever is asked of it
            self.lost.append(f"a {type(value).__name__}, which cannot be read")

    def takes(self, values: Sequence[object], depth: int) -> None:
        """Remember several, where they are not many."""
        if len(values) <= FEW:
            for value in values:
                if id(type(value)) not in PLAIN_IDS:
                    self.take(value, depth)

    def put_back(self) -> None:
        """Undo what has changed, the latest that was remembered first."""
        for undo in reversed(self.undo):
            try:
                undo()
            except Exception as error:  # a class of the user's may refuse to be written
                self.lost.append(f"what refuses to be put back ({type(error).__name__}: {error})")

    def fits(self, count: int, most: int = MANY) -> bool:
        """Tell whether a container's entries are remembered: it is short, and not too many came before it."""
        if count > min(most, self.entries):
            return False
        self.entries -= count
        return True

    def a_list(self, value: list[object], depth: int) -> None:
        """Remember a list."""
        count = list.__len__(value)
        if not self.fits(count):
            self.undo.append(lambda: list.__delitem__(value, slice(count, None)))
            return
        before = list.copy(value)
        self.undo.append(lambda: alike(value, before) or list.__setitem__(value, slice(None), before))
        self.takes(before, depth)

    def a_dict(self, value: dict[Key, object], depth: int) -> None:
        """Remember a dict, its order included."""
        count = dict.__len__(value)
        if not self.fits(count):
            self.undo.append(lambda: shortened(value, count))
            return
        before = items_of(value)
        self.undo.append(lambda: restored_dict(value, before))
        self.takes([one for _, one in before], depth)

    def a_set(self, value: set[object], depth: int) -> None:
        """Remember a set."""
        count = set.__len__(value)
        if not self.fits(count, LONG):
            self.undo.append(lambda: set.__len__(value) == count or self.lose(f"a set of {count}"))
            return
        before = set[object]()
        before.update(value)
        self.undo.append(lambda: restored_set(value, before))

    def a_deque(self, value: deque[object], depth: int) -> None:
        """Remember a deque."""
        count = deque.__len__(value)
        if not self.fits(count, LONG):
            ends = deque.__getitem__(value, 0), deque.__getitem__(value, -1)
            self.undo.append(
                lambda: (
                    (
                        deque.__len__(value) == count
                        and alike([deque.__getitem__(value, 0), deque.__getitem__(value, -1)], ends)
                    )
                    or self.lose(f"a deque of {count}")
                )
            )
            return
        before = list(deque.__iter__(value))
        self.undo.append(lambda: restored_deque(value, before))
        self.takes(before, depth)

    def numbers_in_a_row(self, value: bytearray, depth: int) -> None:
        """Remember bytes, or an array of Python's, which is read and written in the same way."""
        if not self.fits(len(value), LONG):
            count = len(value)
            self.undo.append(lambda: len(value) == count or self.lose(f"a {type(value).__name__} of {count}"))
            return
        before = value[:]
        self.undo.append(lambda: value == before or value.__setitem__(slice(None), before))

    def a_tuple(self, value: tuple[object, ...], depth: int) -> None:
        """Remember what a tuple holds."""
        self.takes(tuple.__getitem__(value, slice(None)), depth)

    def a_tensor(self, value: Tensor, depth: int) -> None:
        """Remember a small tensor that no gradient is taken for; of a large one, whether it is written to."""
        usual = value.layout == torch.strided and not value.is_nested and not value.is_inference()
        if usual and not value.requires_grad and not value.is_meta:
            version, same = value._version, value.detach()
            before = same.clone() if value.numel() <= MANY else None
            self.undo.append(lambda: self.restored_tensor(value, same, before, version))

    def restored_tensor(self, value: Tensor, same: Tensor, before: Tensor | None, version: int) -> None:
        """Give a tensor its numbers back: where they lay, and as they were."""
        if type(value) is Tensor and not laid_alike(value, same):  # resized, or .data was set
            value.data = same
        if value._version == version:
            return
        if before is None:
            self.lose(f"a tensor of shape {tuple(value.shape)} that it writes to")
        else:
            written(value, before)

    def lose(self, what: str) -> None:
        """Note what is changed, and too large to be copied at each call."""
        self.lost.append(what)

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
        for slot in slots_of(type(value)):
            before = content_of(slot, value)
            self.undo.append(lambda slot=slot, before=before: restored_slot(slot, value, before))
            self.take(before, depth)

    def attributes(self, value: object, depth: int) -> None:
        """Remember the attributes of an object of the user's, and nothing where it is torch's or a list."""
        if is_own(type(value).__module__) and type(value).__module__ != "builtins":
            self.an_object(value, depth)

    def of_a_thread(self, value: threading.local, depth: int) -> None:
        """Remember what this thread has of its own."""
        self.a_dict(value.__dict__, depth)

    def a_context(self, value: ContextVar[object], depth: int) -> None:
        """Remember a variable of a context."""
        before = value.get(MISSING)
        self.undo.append(lambda: restored_variable(value, before) or self.lose(f"{value.name}, a ContextVar"))
        self.take(before, depth)

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


WAYS: tuple[tuple[type | tuple[type, ...], Way], ...] = (
    (list, Memory.a_list),
    (dict, Memory.a_dict),
    (set, Memory.a_set),
    (deque, Memory.a_deque),
    ((bytearray, array), Memory.numbers_in_a_row),
    (tuple, Memory.a_tuple),
    (nn.Parameter, lambda memory, value, depth: None),
    (Tensor, Memory.a_tensor),
    (np.ndarray, Memory.an_array),
    (torch.Generator, Memory.a_generator),
    (np.random.Generator, Memory.numbers),
    (np.random.RandomState, Memory.old_numbers),
    (random.SystemRandom, lambda memory, value, depth: None),  # what it draws comes from nowhere
    (random.Random, Memory.python_numbers),
    (queue.Queue, Memory.a_queue),
    ((SimpleNamespace, Namespace, UserDict, UserList, ChainMap), Memory.an_object),
    ((io.IOBase, queue.SimpleQueue), Memory.a_stream),
    (threading.local, Memory.of_a_thread),
    (ContextVar, Memory.a_context),
    (weakref.ref, lambda memory, value, depth: memory.take(value(), depth)),
    (weakref.ProxyTypes, lambda memory, value, depth: None),
)
PLAIN = (int, float, bool, str, bytes, type(None), complex)
PLAIN_IDS = frozenset(map(id, PLAIN))  # a class of the user's may have no hash
REMEMBER: weakref.WeakKeyDictionary[type, Way | None] = weakref.WeakKeyDictionary(dict.fromkeys(PLAIN))
