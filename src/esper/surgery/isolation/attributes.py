"""What a pass may change besides parameters and buffers: attributes, generators, tables; it is put back."""

from __future__ import annotations

import copy
import random
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

Memo: TypeAlias = "dict[int, tuple[Any, Any]]"  # id -> what was copied, kept alive, and its copy

Value = TypeVar("Value")

CONTAINERS = (list, tuple, dict, set, deque)
STREAMS = (np.random.Generator, np.random.RandomState, random.Random)
STATE = (Tensor, np.ndarray, int, float, complex, str, type(None), torch.Generator, *CONTAINERS, *STREAMS)
LARGEST = 64  # entries of a list that are copied one by one; of a longer one the list itself is
SEAM = "_esper_seam"  # the attribute of a module with an open seam, see seam.py
TORCHS = frozenset(nn.Module().__dict__) | {SEAM}  # what every module has

COMPANIONS: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[nn.Module]]] = weakref.WeakKeyDictionary()
MOVERS: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that change their own frozen parameters


def modules_of(model: nn.Module) -> list[nn.Module]:
    """List a model's modules, and those outside that its loss calls: a head of its own, say."""
    outside = [one() for one in COMPANIONS.get(model, ())]
    return [*model.modules(), *(one for one in outside if one is not None)]


@contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """Put back what passes change of plain attributes: a hidden state, a counter, a history, a generator.

    torch's own layers keep no such state, and are passed over.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = []
    memo: Memo = {}
    for module in modules_of(model):
        if type(module).__module__.startswith("torch.nn.modules."):
            continue
        held = module.__dict__
        plain = {n: v for n, v in held.items() if n not in TORCHS and issubclass(type(v), STATE)}
        kept.append((held, plain, set(held)))
        held.update({name: own(value, memo) for name, value in plain.items()})
    try:
        yield
    finally:
        for held, plain, names in kept:
            for name in held.keys() - names - TORCHS:
                if issubclass(type(held[name]), STATE):
                    del held[name]
            held.update(plain)


@contextmanager
def lent_tables(model: nn.Module) -> Iterator[None]:
    """Let passes change parameters that the user's forward changes by itself; the user's own stay.

    An embedding with ``max_norm`` writes to its table as it is read; a model with a moving average of itself
    moves that in training.
    """
    kept: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    moves = model in MOVERS
    memo: Memo = {}
    for module in modules_of(model):
        writes = getattr(module, "max_norm", None) is not None
        held = module._parameters
        lent = {
            name: own(one, memo)
            for name, one in held.items()
            if one is not None and (writes or (moves and not one.requires_grad))
        }
        if lent:
            kept.append((module, held))
            module._parameters = {**held, **lent}
    try:
        yield
    finally:
        for module, parameters in kept:
            module._parameters = parameters


def own(value: Value, memo: Memo, depth: int = 3) -> Value:
    """Copy what a pass may change; what is met twice is copied once.

    By its type: what an object says of its class is code of the user's, which may raise.
    """
    if not issubclass(type(value), (Tensor, np.ndarray, torch.Generator, *CONTAINERS, *STREAMS)):
        return value
    if id(value) not in memo:
        memo[id(value)] = value, made(value, memo, depth)
    return memo[id(value)][1]


def made(value: object, memo: Memo, depth: int) -> object:
    """Make the copy."""
    if isinstance(value, Tensor):
        return fresh(value)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, STREAMS):
        return value if isinstance(value, random.SystemRandom) else copy.deepcopy(value)
    try:
        return copied_container(value, memo, depth)
    except Exception:  # a class of the user's may refuse to be read: what loss and model reach is put back
        return value


def copied_container(value: object, memo: Memo, depth: int) -> object:
    """Copy a container, and what it holds where that is not much."""
    deeper = depth > 0 and isinstance(value, CONTAINERS) and len(value) <= LARGEST
    if isinstance(value, tuple):  # a named one, or one of the user's own, is left alone
        return tuple(own(one, memo, depth - 1) for one in value) if deeper and type(value) is tuple else value
    changed = copy.copy(value)
    if deeper and isinstance(changed, dict):
        for key, one in list(changed.items()):
            changed[key] = own(one, memo, depth - 1)
    elif deeper and isinstance(changed, list):
        changed[:] = [own(one, memo, depth - 1) for one in changed]
    return changed


def fresh(tensor: Tensor) -> Tensor:
    """Copy a tensor without its graph; what is called once a gradient has been added up stays behind."""
    if type(tensor) is nn.Parameter:
        copied = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
        if tensor._backward_hooks:  # a mask on a gradient, say: it may know the shape
            copied._backward_hooks = OrderedDict(tensor._backward_hooks)
        return copied
    if isinstance(tensor, nn.Parameter):
        return copy.deepcopy(tensor)
    clone = tensor.detach().clone()
    return clone.requires_grad_(tensor.requires_grad) if tensor.is_leaf else clone
