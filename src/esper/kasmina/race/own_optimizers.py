"""Makes the optimizer that trains an exposed kernel until it is kept: like that of the layer beside it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from esper.kasmina.widths.places import Place
from esper.surgery.optimizers.adoption import Home, donor_group
from esper.surgery.optimizers.clone import clone_optimizer
from esper.surgery.optimizers.kinds import kind_of

FOLLOWED = ("lr", "momentum", "betas", "weight_decay")  # what torch's schedulers and users change on the way


class OwnOptimizers:
    """Makes a kernel's optimizer like that of the host's layer, and keeps their learning rates together.

    Args:
        optimizers: The user's, by name.
        tell: Function told what and why, where another optimizer than the layer's had to be the model.
    """

    def __init__(self, optimizers: Mapping[str, Optimizer], tell: Callable[[str, str], None]) -> None:
        self.optimizers, self.tell = optimizers, tell
        # by place, because load_state_dict replaces the groups themselves
        self.owners: WeakKeyDictionary[Optimizer, Home] = WeakKeyDictionary()

    def like(self, kernel: nn.Module, place: Place) -> Optimizer:
        """Return an optimizer of the kind and settings of the place's own.

        Where that cannot train a kernel (LBFGS needs a closure, Muon takes matrices only) it is like the
        first other one that can, else Adam at torch's own rate: the rate of LBFGS, 1 as a rule, means
        something else to Adam.
        """
        found = donor_group(self.optimizers, place.ends())
        if found is None:  # the place is frozen
            return torch.optim.Adam(kernel.parameters())
        for optimizer, index in (found, *self._others(found[0])):
            own = built(optimizer, index, kernel)
            if own is not None:
                if optimizer is not found[0]:
                    self._tell(found[0], f"{type(own).__name__} as the host's other one")
                self.owners[own] = optimizer, index
                return own
        own = torch.optim.Adam(kernel.parameters())
        self._tell(found[0], f"Adam at {own.defaults['lr']}")
        return own

    def follow(self, own: Optimizer) -> None:
        """Take over what schedulers have set since."""
        if own in self.owners:
            optimizer, index = self.owners[own]
            group = optimizer.param_groups[index]
            own.param_groups[0].update({key: group[key] for key in FOLLOWED if key in group})

    def _others(self, found: Optimizer) -> Iterator[Home]:
        return ((optimizer, 0) for optimizer in self.optimizers.values() if optimizer is not found)

    def _tell(self, found: Optimizer, instead: str) -> None:
        kind = type(found).__name__
        self.tell("optimizer", f"{kind} cannot train a branch on its own; {instead} does until it is kept")


def built(optimizer: Optimizer, index: int, kernel: nn.Module) -> Optimizer | None:
    """Return a kernel's optimizer of the class and settings of a group, or None where it cannot have one."""
    if needs_closure(type(optimizer)) or not all(map(kind_of(optimizer).takes, kernel.parameters())):
        return None
    return clone_optimizer(optimizer, optimizer.param_groups[index], kernel.parameters())


def needs_closure(kind: type[Optimizer]) -> bool:
    """Tell whether a step needs a closure, as that of LBFGS does."""
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
