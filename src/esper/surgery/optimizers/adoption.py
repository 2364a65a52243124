"""Lets the host's optimizers adopt a kernel that stays as a branch, with what its own optimizer has learned.

New parameters join groups that exist, with their learning rates and decay, so every scheduler and clip goes
on as it was: a group of their own would raise in four of torch's schedulers and silently get another
learning rate in four more (measured).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.errors import OptimizerError, SurgeryError
from esper.surgery.optimizers.clone import clone_optimizer
from esper.surgery.optimizers.history import cleared, forget, remembers
from esper.surgery.optimizers.kinds import kind_of

Home = tuple[Optimizer, int]  # an optimizer and the index of one of its groups


@dataclass(frozen=True, slots=True)
class Adoption:
    """An adoption that was carried out; calling it takes everything back."""

    undo: Callable[[], None]
    lines: tuple[str, ...]  # what was lost on the way, for an event each

    def __call__(self) -> None:
        """Take the adoption back."""
        self.undo()


def donor_group(optimizers: Mapping[str, Optimizer], ends: Iterable[nn.Module]) -> Home | None:
    """Return the optimizer and the index of its group that train a place's own parameters."""
    near = {id(parameter) for end in ends for parameter in end.parameters()}
    for optimizer in optimizers.values():
        for index, group in enumerate(optimizer.param_groups):
            if any(id(parameter) in near for parameter in group["params"]):
                return optimizer, index
    return None


def home(optimizers: Mapping[str, Optimizer], ends: Iterable[nn.Module], parameter: Tensor) -> Home | None:
    """Return the group that a branch's parameter joins.

    Of the groups whose optimizer takes it: the one that trains the place's own parameters of its sort
    (matrices, or vectors, which users exempt from decay); else one that trains any of the place's; else one
    that trains parameters of its sort; else the first.

    Args:
        optimizers: Optimizers of the user's, by name.
        ends: Modules at the two ends of the place.
        parameter: Parameter of the branch.

    Returns:
        None where no optimizer takes it.
    """
    near = {id(own) for end in ends for own in end.parameters()}
    best: tuple[int, Home] | None = None
    for optimizer in optimizers.values():
        if not kind_of(optimizer).takes(parameter):
            continue
        for index, group in enumerate(optimizer.param_groups):
            alike = [p for p in group["params"] if (p.dim() > 1) == (parameter.dim() > 1)]
            rank = (
                3 * any(id(p) in near for p in alike)
                or 2 * any(id(p) in near for p in group["params"])
                or int(bool(alike))
            )
            if best is None or rank > best[0]:
                best = rank, (optimizer, index)
    return None if best is None else best[1]


def own_home(optimizers: Mapping[str, Optimizer], parameter: Tensor | None) -> Home | None:
    """Return the group that holds a parameter."""
    for optimizer in optimizers.values():
        for index, group in enumerate(optimizer.param_groups):
            if any(own is parameter for own in group["params"]):
                return optimizer, index
    return None


def refuse_homeless(
    optimizers: Mapping[str, Optimizer], ends: Iterable[nn.Module], kernel: nn.Module, site: str
) -> None:
    """Refuse optimizers of which none takes some parameter of a branch; ask before a run, not within one.

    Raises:
        OptimizerError: With what to add.
    """
    for name, parameter in kernel.named_parameters():
        if home(optimizers, ends, parameter) is None:
            raise OptimizerError(
                f"no optimizer takes {name!r} of shape {tuple(parameter.shape)}, which a branch at {site} "
                f"has: {_wants(optimizers)}; "
                "add one for the rest, AdamW say, or set blueprints to ['widen']"
            )


def adopt(
    optimizers: Mapping[str, Optimizer],
    ends: Iterable[nn.Module],
    kernel: nn.Module,
    own: Optimizer | None,
    prefix: str = "",
    like: Mapping[str, Tensor] | None = None,
) -> Adoption:
    """Give the host's optimizers a kernel's parameters and their state.

    Args:
        optimizers: Optimizers of the user's, by name.
        ends: Modules at the two ends of the place, see :func:`home`.
        kernel: Module that stays.
        own: Optimizer of the kernel so far, None where there is no state to keep. The state goes along where
            the new optimizer is of the same class.
        prefix: Path of the kernel in the host, for groups that list their parameters' names.
        like: Parameters whose groups those of the kernel join, by the kernel's names; a frozen one is not
            trained, nor is its like.

    Raises:
        SurgeryError: No optimizer takes one of the parameters; nothing was changed.
    """
    ends = tuple(ends)
    homes: list[tuple[str, nn.Parameter, Home]] = []
    for name, parameter in kernel.named_parameters():
        found = own_home(optimizers, (like or {}).get(name))
        if found is None and like is not None and not parameter.requires_grad:
            continue
        found = found or home(optimizers, ends, parameter)
        if found is None:
            raise SurgeryError(
                f"no optimizer takes {name!r} of shape {tuple(parameter.shape)}: {_wants(optimizers)}"
            )
        homes.append((name, parameter, found))
    entered = {id(optimizer) for _, _, (optimizer, _) in homes}
    lines: list[str] = []
    with ExitStack() as back:
        for name, optimizer in optimizers.items():
            if id(optimizer) in entered:
                lines += [cleared(name, optimizer)] if remembers(optimizer) else []
                back.callback(forget(optimizer))
        for name, parameter, (optimizer, index) in homes:
            back.callback(_enter(optimizer, index, f"{prefix}{name}", parameter))
            if own is not None and type(own) is type(optimizer) and parameter in own.state:
                optimizer.state[parameter] = own.state[parameter]
            _begin(optimizer, index, parameter)
        return Adoption(back.pop_all().close, tuple(lines))


def let_go(optimizers: Mapping[str, Optimizer], module: nn.Module) -> list[str]:
    """Take a module's parameters out of the optimizers, with their state.

    Returns:
        What was lost besides, for an event each.
    """
    gone = {id(parameter) for parameter in module.parameters()}
    lines: list[str] = []
    for name, optimizer in optimizers.items():
        held = [p for group in optimizer.param_groups for p in group["params"] if id(p) in gone]
        if held and kind_of(optimizer).history:
            lines += [cleared(name, optimizer)] if remembers(optimizer) else []
            forget(optimizer)
        for group in optimizer.param_groups:
            stays = [id(parameter) not in gone for parameter in group["params"]]
            for key in ("params", "param_names"):
                if key in group:  # in place: LBFGS holds the list itself
                    group[key][:] = [one for one, kept in zip(group[key], stays, strict=True) if kept]
        for parameter in module.parameters():  # a wrapper shares its groups: they may be without it by now
            optimizer.state.pop(parameter, None)
    return lines


def _enter(optimizer: Optimizer, index: int, name: str, parameter: nn.Parameter) -> Callable[[], None]:
    group = optimizer.param_groups[index]
    lists: list[list[object]] = [group["params"]]
    lists[0].append(parameter)  # in place: LBFGS holds the list itself
    if "param_names" in group:
        lists.append(group["param_names"])
        lists[1].append(name)

    def undo() -> None:
        for members in lists:
            members.pop()
        optimizer.state.pop(parameter, None)

    return undo


def _begin(optimizer: Optimizer, index: int, parameter: nn.Parameter) -> None:
    """Give a newcomer without state what its optimizer cannot do without."""
    group, known = optimizer.param_groups[index], optimizer.state
    if kind_of(optimizer).born and parameter not in known:  # Adagrad makes its own in the constructor
        fresh = clone_optimizer(optimizer, group, [parameter])
        if fresh is not None and parameter in fresh.state:
            known[parameter] = fresh.state[parameter]
    # Fused SGD raises where some buffers of a group exist and others do not (torch 2.13). From zero the first
    # step is what it would have been, but for dampening.
    if not group.get("fused") or "momentum_buffer" in known.get(parameter, {}):
        return
    if any(known[p].get("momentum_buffer") is not None for p in group["params"] if p in known):
        known[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _wants(optimizers: Mapping[str, Optimizer]) -> str:
    wanted = ((name, optimizer, kind_of(optimizer).wants) for name, optimizer in optimizers.items())
    return ", ".join(f"{name!r} is {type(one).__name__}, for {wants}" for name, one, wants in wanted)
