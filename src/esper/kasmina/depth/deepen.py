"""Put one more block into a container of blocks, with what counts them, and take it out again exactly.

The children of a container keep their names: at the end a new one takes the next number; in the middle of a
``Sequential``, which runs its children in order whatever they are called, it is named after the block before
it ("2_1" behind "2"), so no key of a state dict changes its meaning.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType

import torch
from torch import Tensor, nn

from esper.contracts import DeepenPlan
from esper.errors import SurgeryError

ATOMIC = (bool, int, float, complex, str, bytes, type(None), type, FunctionType, ModuleType, torch.dtype)
PLAIN = (*ATOMIC, Tensor)
BOOKKEEPING = frozenset(vars(nn.Module()))  # what every module has of its own


@dataclass(frozen=True, slots=True)
class Inserted:
    """A block that was inserted; ``undo`` leaves container and counts as they were."""

    block: nn.Module
    undo: Callable[[], None]


def at(root: object, path: str) -> object:
    """Return the object a dotted path leads to."""
    return functools.reduce(getattr, filter(None, path.split(".")), root)


def insert(model: nn.Module, plan: DeepenPlan, block: nn.Module) -> Inserted:
    """Insert a block where a plan says, and bring what counts blocks up to date.

    Args:
        model: The plan's paths start here.
        plan: Plan that says where.
        block: Block of the donor's class; made by :func:`duplicate` as a rule. It takes the donor's modes.

    Raises:
        SurgeryError: The container has no such place, or the block other shapes than its donor; nothing was
            changed.
    """
    try:
        container, donor = model.get_submodule(plan.container), model.get_submodule(plan.donor)
    except AttributeError as error:
        raise SurgeryError(f"the model has no stack {plan.site!r}: {error}") from None
    children = list(container._modules.items())
    if type(block) is not type(donor) or plan.name in container._modules or plan.index > len(children):
        raise SurgeryError(
            f"{plan.container or 'the model'} holds {len(children)} blocks of {type(donor).__name__}; a "
            f"{type(block).__name__} {plan.name!r} at {plan.index} does not fit"
        )
    if unlike := _first_unlike(donor, block):
        raise SurgeryError(
            f"the block for {plan.site!r} is no copy of {plan.donor!r} as that is now: {unlike}; a plan says "
            "no more than that it is"
        )
    for module, twin in zip(donor.modules(), block.modules(), strict=True):
        twin.training = module.training
    _arrange(container, [*children[: plan.index], (plan.name, block), *children[plan.index :]])
    kept: list[tuple[object, str, object]] = []

    def undo() -> None:
        for owner, attribute, value in reversed(kept):
            setattr(owner, attribute, value)
        del container._modules[plan.name]

    try:
        for path, attribute, value in plan.counts:
            owner = at(model, path)
            before = getattr(owner, attribute)
            setattr(owner, attribute, list(value) if isinstance(value, tuple) else value)
            kept.append((owner, attribute, before))
    except Exception as error:  # what sets them is the user's code: it raises what it likes
        undo()
        raise SurgeryError(
            f"what counts the blocks of {plan.site!r} is not there, or cannot be set: {error}"
        ) from error
    except BaseException:  # Ctrl-C must leave no half of a block
        undo()
        raise
    return Inserted(block, undo)


def _first_unlike(donor: nn.Module, block: nn.Module) -> str:
    """Say which tensor of a block has another shape than its donor's; "" where none has."""
    shapes = {
        name: tuple(tensor.shape) for name, tensor in (*block.named_parameters(), *block.named_buffers())
    }
    for name, tensor in (*donor.named_parameters(), *donor.named_buffers()):
        if shapes.get(name) != tuple(tensor.shape):
            return f"{name} is {shapes.get(name)} in it and {tuple(tensor.shape)} there"
    return ""


def remove(model: nn.Module, plan: DeepenPlan) -> nn.Module:
    """Take a block out that came by a plan, the newest of its container, and count it no longer.

    Returns:
        The block.

    Raises:
        SurgeryError: It is not there; nothing was changed.
    """
    container = model.get_submodule(plan.container)
    if plan.name not in container._modules:
        raise SurgeryError(f"{plan.container or 'the model'} has no block {plan.name!r} to take out")
    own = f"{plan.container}.{plan.name}".lstrip(".")
    for path, attribute, value in plan.counts:
        if path != own and not path.startswith(f"{own}."):  # the block's own numbers go with it
            fewer = value - 1 if isinstance(value, int) else [*value[: plan.index], *value[plan.index + 1 :]]
            setattr(at(model, path), attribute, fewer)
    block = container._modules.pop(plan.name)
    assert block is not None
    return block


def _arrange(container: nn.Module, children: list[tuple[str, nn.Module | None]]) -> None:
    container._modules.clear()
    container._modules.update(children)


def duplicate(model: nn.Module, donor: str) -> nn.Module:
    """Copy a block; what it shares with the rest of the model, a config say, the copy shares too.

    Raises:
        SurgeryError: It cannot be copied.
    """
    block = model.get_submodule(donor)
    inside = set(map(id, block.modules()))
    memo = {id(thing): thing for thing in _held(model, inside)}
    try:
        twin: nn.Module = copy.deepcopy(block, memo)
    except Exception as error:  # a block may say itself how it is copied
        raise SurgeryError(f"{donor} cannot be copied: {error}") from error
    for parameter in twin.parameters():
        parameter.grad = None
    return twin


def _held(model: nn.Module, inside: set[int]) -> Iterator[object]:
    """List what modules outside a block hold as attributes."""
    for module in model.modules():
        if id(module) in inside:
            continue
        yield module
        for name, value in vars(module).items():
            if name in BOOKKEEPING or isinstance(value, PLAIN) or id(value) in inside:
                continue
            if value or not isinstance(value, tuple):
                yield value


def twin_of(average: nn.Module, plan: DeepenPlan, block: nn.Module) -> nn.Module:
    """Return a block for an averaged copy of the model: the average of what has just come is itself."""
    twin = duplicate(average, plan.donor)
    twin.load_state_dict(block.state_dict())
    return twin
