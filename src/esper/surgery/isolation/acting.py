"""Gateways that change what a module gives, seen by what reads a model without calling it.

A kernel that is being let in is part of what the model computes and hangs under no module of the user's. A
state without it would be another model's: so the state has it, under keys that no plain model takes. What
reads a module's source or its graph passes seams by: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from esper.errors import StateError

KEY = "_esper_seed"  # in a state, behind the path of the layer that a kernel adds to


@runtime_checkable
class Acting(Protocol):
    """A gateway that may change a module's output."""

    def part(self) -> Mapping[str, Tensor] | None:
        """Return the tensors of what it adds that no module of the user's holds; None: it adds nothing."""


def parts(gateways: Iterable[tuple[str, object]]) -> list[Mapping[str, Tensor]]:
    """Return what acts on a module's output."""
    acting = [one for role, one in gateways if role == "exit" and isinstance(one, Acting)]
    return [part for one in acting if (part := one.part()) is not None]


def held(gateways: Iterable[tuple[str, object]]) -> dict[str, Tensor]:
    """Return the tensors that act on a module's output, by their keys in its state.

    Where several seeds act on it, the keys of each but the first have its number.
    """
    found: dict[str, Tensor] = {}
    for index, part in enumerate(parts(gateways)):
        prefix = f"{KEY}.{index}" if index else KEY
        found |= {f"{prefix}.{name}": tensor for name, tensor in part.items()}
    return found


def take(own: Mapping[str, Tensor], state: dict[str, object], prefix: str, errors: list[str]) -> None:
    """Write a seed's tensors back from a state, and take them out of it; a state without any leaves it.

    Args:
        own: Tensors that act on the module now, by key; without any, the state is left as it is, and torch
            names the keys that nobody takes.
        state: State to load from.
        prefix: Prefix of the module's keys.
        errors: Messages; what does not fit is added.
    """
    found = [key[len(prefix) :] for key in state if is_seed(key, prefix)]
    given: dict[str, Any] = {key: state[prefix + key] for key in found}
    if not own or not given:
        return
    for key in given:
        del state[prefix + key]
    if {k: t.shape for k, t in own.items()} != {k: getattr(t, "shape", None) for k, t in given.items()}:
        errors.append(f"{prefix}{KEY} is the state of another seed than the one that is awake")
        return
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(given[key])


def is_seed(key: str, prefix: str = "") -> bool:
    """Tell whether a key of a state is a seed's."""
    return key.startswith(f"{prefix}{KEY}.") if prefix else f".{KEY}." in f".{key}"


def own_state(module: nn.Module, keep_vars: bool = False) -> dict[str, Any]:
    """Return a module's state without the seeds that are awake; a run keeps those by themselves."""
    state = module.state_dict(keep_vars=keep_vars)
    return {key: value for key, value in state.items() if not is_seed(key)}


def refuse_reading(gateways: Iterable[tuple[str, object]], what: str, instead: str) -> None:
    """Refuse to have a module read where something acts on it that would be missing from what is read.

    Raises:
        StateError: It would.
    """
    if parts(gateways):
        raise StateError(
            f"{what} reads a layer without calling it, and would leave out the branch that Esper adds to its "
            f"output: {instead}"
        )
