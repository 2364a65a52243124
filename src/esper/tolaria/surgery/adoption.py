"""Lets the host's optimizer adopt a kernel that stays as a branch, with what its own optimizer has learned.

The new parameters join the group of the layer they stand beside, so every scheduler, decay group and clip
goes on as it was: a group of their own would raise in four of torch's schedulers and silently get another
learning rate in four more (measured).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn
from torch.optim import Optimizer


def donor_group(
    optimizers: Mapping[str, Optimizer], ends: Iterable[nn.Module]
) -> tuple[Optimizer, int] | None:
    """Return the optimizer and the index of its group that train a place's own parameters."""
    near = {id(parameter) for end in ends for parameter in end.parameters()}
    for optimizer in optimizers.values():
        for index, group in enumerate(optimizer.param_groups):
            if any(id(parameter) in near for parameter in group["params"]):
                return optimizer, index
    return None


def adopt(
    optimizers: Mapping[str, Optimizer], ends: Iterable[nn.Module], kernel: nn.Module, own: Optimizer | None
) -> Callable[[], None]:
    """Give the host's optimizer a kernel's parameters and their state; returns the way back.

    Args:
        optimizers: The user's, by name.
        ends: The place; parameters that no optimizer owns (frozen ones) leave the first group as donor.
        kernel: What stays.
        own: The kernel's optimizer so far, None where there is no state to keep.
    """
    optimizer, index = donor_group(optimizers, ends) or (next(iter(optimizers.values())), 0)
    group, parameters = optimizer.param_groups[index], list(kernel.parameters())
    before = list(group["params"])
    group["params"] = [*before, *parameters]
    if own is not None and type(own) is type(optimizer):
        for parameter in parameters:
            if parameter in own.state:
                optimizer.state[parameter] = own.state[parameter]

    def undo() -> None:
        group["params"] = before
        for parameter in parameters:
            optimizer.state.pop(parameter, None)

    return undo
