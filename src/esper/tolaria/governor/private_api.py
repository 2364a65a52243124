"""What the governor uses of torch that torch does not promise; read in torch 2.13."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from functools import cache

import torch
from torch import Tensor, nn

from esper.private_torch import demand

READ_IN = "2.13"
OF_MODULES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")


@cache
def require() -> None:
    """Ask for every name below, once.

    Raises:
        EsperError: This torch lacks one.
    """
    for owner, names in (
        (torch, ("_foreach_norm",)),
        (nn.Module(), OF_MODULES),
        (torch.empty(0), (*OF_TENSORS, "_version", "_values")),
    ):
        demand(owner, names, READ_IN, "the governor")


def foreach_norm(tensors: list[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor, as a float32 scalar, in one call for all; nothing is waited for."""
    return list(torch._foreach_norm(tensors, 2, dtype=torch.float32))


def values_of(sparse: Tensor) -> Tensor:
    """Return the values of a sparse tensor that need not be coalesced."""
    return sparse._values()


def version_of(tensor: Tensor) -> int:
    """Count the writes to a tensor; free, but ``.data`` escapes it."""
    return tensor._version


def listening(host: nn.Module) -> Iterator[tuple[object, str, MutableMapping[int, object]]]:
    """List the tables of everybody who listens to a host's modules and parameters: owner, name, table."""
    for names, owners in ((OF_MODULES, host.modules()), (OF_TENSORS, host.parameters())):
        yield from ((owner, name, getattr(owner, name) or {}) for owner in owners for name in names)
