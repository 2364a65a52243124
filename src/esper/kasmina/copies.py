"""Run a model on copies of all that it holds: whatever is tried meanwhile, afterwards it is as it was.

Modules stay the objects they are and get another ``__dict__`` for a while, so that a loss that reaches a
layer by another way than its argument sees the copies too.
"""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from esper.kasmina.seam import ATTRIBUTE, core_of, is_open, plain_class

Memo: TypeAlias = "dict[int, tuple[Any, Any]]"  # id -> what was copied, kept alive, and its copy

TABLES = ("_parameters", "_buffers")
CONTAINERS = (list, tuple, dict, set, deque)
STREAMS = (np.random.Generator, np.random.RandomState, random.Random)
LARGEST = 64  # entries of a list that are copied one by one; of a longer one the list itself is


@contextmanager
def on_copies(model: nn.Module) -> Iterator[None]:
    """Let a model run, and be changed, on copies of its parameters, buffers and other attributes.

    What is no tensor, number, container or random generator is shared, and so are scripted modules: they
    hold their state elsewhere, and get their mode back.
    """
    scripted = [(one, one.training) for one in model.modules() if isinstance(one, torch.jit.ScriptModule)]
    modules = [one for one in model.modules() if not isinstance(one, torch.jit.ScriptModule)]
    modules += [core_of(one) for one in modules if is_open(one)]  # its calls run behind the seam
    before = [(module, module.__dict__) for module in modules]
    made: dict[int, dict[str, Any]] = {}  # a module and its core share one
    memo: Memo = {}
    try:
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in memo:
                    memo[id(parameter)] = parameter, fresh(parameter)
        for module, held in before:
            if id(held) not in made:
                made[id(held)] = {name: entry(name, value, memo) for name, value in held.items()}
            module.__dict__ = made[id(held)]
        yield
    finally:
        for module, held in before:
            module.__dict__ = held
        for module, mode in scripted:
            module.training = mode


@contextmanager
def same_attributes(model: nn.Module) -> Iterator[None]:
    """Put back what passes change of a model's plain attributes: a hidden state, a counter, a history.

    torch's own layers keep no such state, and are passed over.
    """
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    memo: Memo = {}
    for module in model.modules():
        if plain_class(module).__module__.startswith("torch.nn.modules."):
            continue
        held = module.__dict__
        plain = {name: value for name, value in held.items() if is_state(name, value)}
        if plain:
            kept.append((held, plain))
            held.update({name: own(value, memo) for name, value in plain.items()})
    try:
        yield
    finally:
        for held, plain in kept:
            held.update(plain)


def is_state(name: str, value: Any) -> bool:
    """Tell an attribute that a pass may change and that is neither parameter, buffer nor torch's own."""
    torchs = name.startswith("_") and isinstance(value, dict) and name in TORCHS
    return not torchs and name != "training" and isinstance(value, STATE)


TORCHS = frozenset(nn.Module().__dict__) | {ATTRIBUTE}
STATE = (Tensor, np.ndarray, int, float, complex, str, type(None), torch.Generator, *CONTAINERS, *STREAMS)


def entry(name: str, value: Any, memo: Memo) -> Any:
    """Copy one entry of a module's ``__dict__``."""
    if name in TABLES:
        return {key: None if one is None else own(one, memo) for key, one in value.items()}
    if name in TORCHS:
        return copy.copy(value)  # tables of submodules and hooks, which stay what they are
    return own(value, memo)


def own(value: Any, memo: Memo, depth: int = 3) -> Any:
    """Copy what a pass may change; what is met twice is copied once."""
    if not isinstance(value, (Tensor, np.ndarray, torch.Generator, *CONTAINERS, *STREAMS)):
        return value
    if id(value) not in memo:
        memo[id(value)] = value, made(value, memo, depth)
    return memo[id(value)][1]


def made(value: Any, memo: Memo, depth: int) -> Any:
    """Make the copy."""
    if isinstance(value, Tensor):
        return fresh(value)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, STREAMS):
        return copy.deepcopy(value)
    deeper = depth > 0 and len(value) <= LARGEST
    if isinstance(value, tuple):  # a named one, or one of the user's own, is left alone
        return tuple(own(one, memo, depth - 1) for one in value) if deeper and type(value) is tuple else value
    changed = copy.copy(value)
    if deeper and isinstance(value, dict):
        for key, one in value.items():
            changed[key] = own(one, memo, depth - 1)
    elif deeper and isinstance(value, list):
        changed[:] = [own(one, memo, depth - 1) for one in value]
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
