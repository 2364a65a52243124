"""Change the shape of a model that FSDP2 has sharded: make it plain on every rank, operate, shard it again.

The usual surgery works on full tensors, so between :func:`unshard` and :meth:`Resharding.again` every rank
holds the whole model and its optimizers' state. All ranks must do the same in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer

from esper.distributed.fsdp.private_api import State, is_quiet, owners, parameters, peeled, states, strip
from esper.distributed.fsdp.recorded_call import Call
from esper.errors import SurgeryError

Key = tuple[str, str, str]  # optimizer, parameter, entry of its state
Layout = tuple[DeviceMesh, tuple[Placement, ...]]


class Resharding:
    """A model that was sharded and is plain for a while; :func:`unshard` makes it.

    Args:
        model: Module that was sharded.
        optimizers: Optimizers, by name.
        calls: Calls of ``fully_shard`` to repeat, in order.
        layouts: Mesh and placements of each tensor of optimizer state.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Mapping[str, Optimizer],
        calls: list[Call],
        layouts: Mapping[Key, Layout],
    ) -> None:
        self.model, self.optimizers = model, optimizers
        self.calls, self.layouts = calls, layouts

    def again(self) -> list[str]:
        """Shard the model as it was, in the shapes it has now; collective.

        A parameter that is new since joins its nearest sharded ancestor; one that was held back from sharding
        stays so.

        Returns:
            One line for each parameter that could not be sharded along the axis it was.
        """
        plain = dict(self.model.named_parameters())
        reasons = [line for call in self.calls for line in call.moved_axes()]
        with peeled(self.model.modules()):
            for call in self.calls:
                call.repeat()
        for call in self.calls:
            call.settle()
        swap = {plain[n]: p for n, p in self.model.named_parameters() if plain[n] is not p}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for label, optimizer in self.optimizers.items():
            exchange(optimizer, swap)
            for parameter in swap.values():
                state = optimizer.state.get(parameter, {})
                for key, value in state.items():
                    layout = self.layouts.get((label, names[parameter], key))
                    state[key] = spread(value, parameter, layout)
        return reasons


def unshard(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> Resharding:
    """Make a sharded model plain in place: modules, names, hooks and buffers stay; collective.

    Full parameters take the places of the sharded ones, in the optimizers too, whose state becomes full
    tensors. Gradients are dropped, so call it where none is due. Each rank needs the memory of all of it.

    Args:
        model: Module, sharded in whole or in part; its FSDP root must be in it.
        optimizers: Optimizers that hold its parameters, all of them, by name.

    Raises:
        SurgeryError: It could not be undone and done again exactly, or the ranks differ; nothing was changed.
    """
    found = states(model)
    if any(is_quiet(state) for state in found):
        raise SurgeryError("unshard() inside gathered(): leave that first")
    for state in found:
        state._modules[0].reshard()  # so that what the modules hold is what the optimizers hold
    names = {parameter: name for name, parameter in model.named_parameters()}
    refuse_unusual(found, names)
    pieces = state_pieces(optimizers, names)
    refuse_difference(found, names, pieces)
    calls = [Call(state, found) for state in found]

    managed = [entry for state in found for entry in parameters(state)]
    full = {entry.sharded_param: plain(entry.sharded_param) for entry in managed}
    values = {key: full_copy(value) for key, value in pieces.items()}

    with peeled(model.modules()):
        for state in found:
            strip(state)
    for entry in managed:
        for module, leaf in owners(entry):
            module._parameters[leaf] = full[entry.sharded_param]
    for optimizer in optimizers.values():
        exchange(optimizer, full)
    now = dict(model.named_parameters())
    for (label, name, key), value in values.items():
        optimizers[label].state[now[name]][key] = value
    layouts = {key: (value.device_mesh, value.placements) for key, value in pieces.items()}
    return Resharding(model, optimizers, calls, layouts)


def refuse_unusual(found: Iterable[State], names: Mapping[nn.Parameter, str]) -> None:
    """Refuse what could not be sharded again just so."""
    held = list(found)
    for state in held:
        kind = type(state._modules[0]).__name__
        root = next(iter(state._state_ctx.all_states), state)
        if all(root is not other for other in held):
            raise SurgeryError(f"a sharded {kind} belongs to a larger FSDP model; give that one")
        if len(state._fsdp_param_groups) > 1:
            raise SurgeryError(f"{kind}: its parameters are sharded over several meshes; one is supported")
        for entry in parameters(state):
            param = entry.sharded_param
            name = names.get(param, owners(entry)[0][1])
            if entry.is_dtensor:
                raise SurgeryError(f"{name!r} is tensor-parallel as well; only FSDP can be undone and redone")
            if type(param.to_local()) is not Tensor:
                raise SurgeryError(
                    f"{name!r} is a {type(param.to_local()).__name__}; only a plain one can grow"
                )
            if param._backward_hooks or param._post_accumulate_grad_hooks:
                raise SurgeryError(f"{name!r} has hooks, which sharding again would lose; remove them first")


def state_pieces(
    optimizers: Mapping[str, Optimizer], names: Mapping[nn.Parameter, str]
) -> dict[Key, DTensor]:
    """Return all optimizer state that is spread over the ranks.

    Raises:
        SurgeryError: An optimizer holds a sharded parameter the model does not have, or nested tensors.
    """
    found: dict[Key, DTensor] = {}
    for label, optimizer in optimizers.items():
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            if isinstance(parameter, DTensor) and parameter not in names:
                raise SurgeryError(
                    f"optimizer {label!r} holds a sharded parameter of shape {tuple(parameter.shape)} that "
                    "is not in the model; make the optimizer after fully_shard"
                )
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, DTensor):
                    found[label, names[parameter], key] = value
                elif isinstance(value, (list, tuple, dict)):
                    raise SurgeryError(
                        f"{type(optimizer).__name__} {label!r} keeps a {type(value).__name__} as {key!r}; "
                        "sharded state must be single tensors"
                    )
    return found


def refuse_difference(
    found: Iterable[State], names: Mapping[nn.Parameter, str], pieces: Mapping[Key, DTensor]
) -> None:
    """Refuse, on all ranks together, where one would gather other tensors than the rest: they would hang."""
    order = [names[entry.sharded_param] for state in found for entry in parameters(state)]
    shapes = [(name, tuple(p.shape)) for p, name in names.items()]
    told = json.dumps([order, shapes, [(*key, tuple(value.shape)) for key, value in pieces.items()]])
    mine = int.from_bytes(hashlib.sha256(told.encode()).digest()[:7], "big")
    device = next(iter(found))._device if order else torch.device("cpu")
    both = torch.tensor([mine, -mine], device=device)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    if int(both[0]) != -int(both[1]):
        raise SurgeryError(
            "ranks hold different parameters or optimizer state; every rank must have grown and stepped alike"
        )


def plain(sharded: nn.Parameter) -> nn.Parameter:
    """Gather one parameter; its own attributes go along."""
    full = nn.Parameter(full_copy(sharded), requires_grad=sharded.requires_grad)
    full.__dict__.update({k: v for k, v in sharded.__dict__.items() if not k.startswith("_")})
    return full


@torch.no_grad()
def full_copy(value: Tensor) -> Tensor:
    """Return all of a tensor that is spread over the ranks, in memory of its own."""
    spread_out = cast("DTensor", value.detach())
    # Offloaded ones come back for it.
    on_mesh = cast("DTensor", spread_out.to(spread_out.device_mesh.device_type))
    return on_mesh.full_tensor().clone(memory_format=torch.contiguous_format).to(value.device)


@torch.no_grad()
def spread(value: object, like: Tensor, layout: Layout | None) -> object:
    """Give every rank its part of a full state tensor.

    Args:
        value: Anything; what is not a tensor, or does not go with the parameter, is returned as it is.
        like: Sharded parameter it belongs to.
        layout: Mesh and placements it had before; None where it is new.
    """
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    if layout is None and value.shape != like.shape:
        return value
    mesh, placements = layout if layout is not None else (like.device_mesh, like.placements)
    if value.shape == like.shape:
        placements = like.placements
    whole = tuple(
        p if isinstance(p, (Shard, Replicate)) else Replicate() for p in placements
    )  # Partial: summed
    part = (
        distribute_tensor(value, mesh, whole, src_data_rank=None)
        .to_local()
        .clone()
        .to(like.to_local().device)
    )
    return DTensor.from_local(part, mesh, whole, run_check=False, shape=value.shape, stride=value.stride())


def exchange(optimizer: Optimizer, swap: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Put other parameters in the places of those an optimizer holds; groups, order and state stay."""
    for group in optimizer.param_groups:
        group["params"][:] = [swap.get(parameter, parameter) for parameter in group["params"]]
    held = [(cast("nn.Parameter", parameter), state) for parameter, state in optimizer.state.items()]
    items = [(swap.get(parameter, parameter), state) for parameter, state in held]
    optimizer.state.clear()
    optimizer.state.update(items)
