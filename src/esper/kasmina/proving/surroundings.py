"""What a proof relied on besides numbers: which modules there are, of which class, with which hooks."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor, nn

from esper.kasmina.seeds.compiling import WRAPPED
from esper.surgery.isolation.seam import is_open

Surroundings: TypeAlias = "list[tuple[object, ...]]"
HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def surroundings(model: nn.Module) -> Surroundings:
    """List what would make a place another one; sizes, modes and what learns are not among it.

    Of modules and hooks it holds the ids, and nothing that keeps them alive.
    """
    first: dict[int, str] = {}
    tied = [
        (name, first[id(one)])
        for name, one in model.named_parameters(remove_duplicate=False)
        if first.setdefault(id(one), name) != name
    ]
    return [*(about(path, module) for path, module in model.named_modules()), *tied]


def changed(before: Surroundings, now: Surroundings) -> list[str]:
    """Name the modules that are another, or are not there any more."""
    return list(
        dict.fromkeys(str(one[0] or "the model") for one in [*unlike(now, before), *unlike(before, now)])
    )


def unlike(these: Surroundings, others: Surroundings) -> list[tuple[object, ...]]:
    """List the descriptions that are not among others."""
    known = {one[0]: one for one in others}
    return [one for one in these if known.get(one[0]) != one]


def about(path: str, module: nn.Module) -> tuple[object, ...]:
    """Describe one module."""
    held = vars(module)
    kind = type(module).__mro__[1] if is_open(module) else type(module)  # a seam is Esper's own
    hooks = [tuple(held[table]) for table in HOOKS if held.get(table)]
    tensors = [(name, look(one)) for name, one in module._parameters.items() if one is not None]
    calls = None if WRAPPED in module._modules else held.get("forward")  # of the object itself, or compiled
    return path, id(module), kind, hooks, id(calls), tensors


def look(tensor: Tensor) -> tuple[object, ...]:
    """Describe a parameter."""
    return type(tensor), tensor.dtype, tuple(tensor._backward_hooks or ())
