"""Run a model on copies of all that it holds: whatever is tried meanwhile, afterwards it is as it was.

Modules stay the objects they are and get another ``__dict__`` for a while, so that a loss that reaches a
layer by another way than its argument sees the copies too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esper.surgery.isolation.attributes import TORCHS, Memo, fresh, modules_of, own
from esper.surgery.isolation.seam import core_of, is_open

CLOSED = 1e-3  # all of a gate is smaller
STIR = 0.5  # what is added to it then
TABLES = ("_parameters", "_buffers")


@contextmanager
def on_copies(
    model: nn.Module, copy_of: Callable[[nn.Parameter], Tensor] = fresh
) -> Iterator[Callable[[], list[str]]]:
    """Let a model run, and be changed, on copies of its parameters, buffers and other attributes.

    What is no tensor, number, container or random generator is shared, and so are scripted modules: they
    hold their state elsewhere, and get their mode back.

    Args:
        model: The host.
        copy_of: Makes the copy of a parameter.

    Yields:
        What lists the parameters that are not what they were.
    """
    scripted = [(one, one.training) for one in model.modules() if isinstance(one, torch.jit.ScriptModule)]
    modules = [one for one in modules_of(model) if not isinstance(one, torch.jit.ScriptModule)]
    modules += [core_of(one) for one in modules if is_open(one)]  # its calls run behind the seam
    before = [(module, module.__dict__) for module in modules]
    made: dict[int, dict[str, object]] = {}  # a module and its core share one
    memo: Memo = {}
    names = dict(model.named_parameters())

    def changed() -> list[str]:
        copies = {name: memo[id(parameter)][1] for name, parameter in names.items() if id(parameter) in memo}
        return [name for name, one in copies.items() if not torch.equal(one, names[name])]

    try:
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and id(parameter) not in memo:
                    memo[id(parameter)] = parameter, copy_of(parameter)
        for module, held in before:
            if id(held) not in made:
                made[id(held)] = copied(held, memo)
            module.__dict__ = made[id(held)]
        yield changed
    finally:
        for module, held in before:
            module.__dict__ = held
        for module, mode in scripted:
            module.training = mode


def stirred(parameter: nn.Parameter) -> Tensor:
    """Return a copy of a parameter, stirred."""
    made = fresh(parameter)
    stir(made)
    return made


def stir(copy_: Tensor) -> None:
    """Move a copy of a parameter away from zero where all of it is zero or next to it.

    A gate or a last layer that begins there (ReZero, LayerScale, LoRA, zero-init residuals) lets nothing
    through and nothing back, so that whatever stands before it would look equal to anything else.
    """
    if copy_.is_floating_point() and copy_.numel() and float(copy_.detach().abs().max()) < CLOSED:
        with torch.no_grad():
            waves = torch.arange(copy_.numel(), device=copy_.device).cos().view(copy_.shape)
            copy_ += STIR * waves.to(copy_.dtype)


def copied(held: Mapping[str, object], memo: Memo) -> dict[str, object]:
    """Copy what a module holds."""
    return {name: entry(name, value, memo) for name, value in held.items()}


def entry(name: str, value: object, memo: Memo) -> object:
    """Copy one entry of a module's ``__dict__``."""
    if name in TABLES and isinstance(value, dict):
        return {key: None if one is None else own(one, memo) for key, one in value.items()}
    if name in TORCHS:
        tables = isinstance(value, dict)  # of submodules and hooks, which stay what they are
        return value.copy() if tables else copy.copy(value)  # 20 times as quick as copy.copy of a table
    return own(value, memo)
