"""Write down a call of ``fully_shard`` from what it left behind, and repeat it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from esper.distributed.fsdp.private_api import Group, State, handles, owners, parameters, state_of
from esper.errors import SurgeryError

# What users set on a group after they sharded it; a torch that lacks one has not had it set.
SETTINGS = (
    "reduce_grads all_reduce_grads reshard_after_backward reduce_scatter_max_input_buffers "
    "gradient_divide_factor reduce_scatter_unused_params force_sum_reduction_for_comms unshard_async_op "
    "unshard_in_backward _all_reduce_hook _all_reduce_hook_stream _all_gather_comm _reduce_scatter_comm"
).split()


class Call:
    """One call of ``fully_shard``: what it was given, and what was set since.

    Args:
        state: State of FSDP's that the call made.
        found: All states of the model; a module without parameters of its own takes the mesh from them.
    """

    def __init__(self, state: State, found: Iterable[State]) -> None:
        everywhere = list(found)
        groups = [*state._fsdp_param_groups, *(g for other in everywhere for g in other._fsdp_param_groups)]
        if not groups:
            raise SurgeryError("the sharded model has no parameters, so its mesh is not known")
        group = groups[0]
        self.modules: tuple[nn.Module, ...] = tuple(state._modules)
        self.mesh, self.mp_policy, self.offload = group.mesh_info.mesh, state._mp_policy, group.offload_policy
        self.reshard = after_forward(state, group)
        self.axes = {owners(p)[0]: p.fsdp_placement.dim for p in parameters(state) if p.fsdp_placement.dim}
        managed = {owner for other in everywhere for p in parameters(other) for owner in owners(p)}
        inside = {(m, leaf) for top in self.modules for m in top.modules() for leaf, p in own(m)}
        self.ignored = inside - managed
        self.settings = {name: getattr(group, name) for name in SETTINGS if hasattr(group, name)}
        self.reduce_group = getattr(group.mesh_info, "reduce_scatter_process_group", None)
        self.prefetch = [
            [other._modules[0] for other in others]
            for others in (state._states_to_forward_prefetch, state._states_to_backward_prefetch)
        ]
        self.last_backward: bool = state._state_ctx.is_last_backward
        self.order = [(module, *around(module, {h.id for h in handles(state)})) for module in self.modules]

    def moved_axes(self) -> list[str]:
        """Forget axes that no longer divide evenly, as FSDP asks of all but the first; say which."""
        lines = []
        for (module, leaf), axis in list(self.axes.items()):
            parameter = module._parameters[leaf]
            assert parameter is not None
            if parameter.shape[axis] % self.mesh.size(self.mesh.ndim - 1):
                del self.axes[module, leaf]
                lines.append(
                    f"{leaf!r} of shape {tuple(parameter.shape)} is sharded along axis 0, not {axis}"
                )
        return lines

    def repeat(self) -> None:
        """Shard the modules again, in the shapes they have now."""
        ignored = {
            p
            for m in self.modules
            for sub in m.modules()
            for leaf, p in own(sub)
            if (sub, leaf) in self.ignored
        }
        axes = {module._parameters[leaf]: Shard(axis) for (module, leaf), axis in self.axes.items()}
        fully_shard(
            list(self.modules) if len(self.modules) > 1 else self.modules[0],
            mesh=self.mesh,
            reshard_after_forward=self.reshard,
            shard_placement_fn=axes.get if axes else None,
            mp_policy=self.mp_policy,
            offload_policy=self.offload,
            ignored_params=ignored or None,
        )

    def settle(self) -> None:
        """Set what was set since, once all modules are sharded."""
        first = cast("FSDPModule", self.modules[0])
        state = state_of(first)
        for group in state._fsdp_param_groups:
            for name, value in self.settings.items():
                setattr(group, name, value)
            if self.reduce_group is not None:
                group.mesh_info.reduce_scatter_process_group = self.reduce_group
        first.set_modules_to_forward_prefetch(self.prefetch[0])
        first.set_modules_to_backward_prefetch(self.prefetch[1])
        state._state_ctx.is_last_backward = self.last_backward
        for module, before, after in self.order:
            # Ordered, which their annotation does not say.
            enter = cast("OrderedDict[int, object]", module._forward_pre_hooks)
            leave = cast("OrderedDict[int, object]", module._forward_hooks)
            for key in reversed([key for key in before if key in enter]):
                enter.move_to_end(key, last=False)
            for key in [key for key in after if key in leave]:
                leave.move_to_end(key)


def after_forward(state: State, group: Group) -> bool | int | None:
    """Return what ``reshard_after_forward`` was; None where FSDP chose."""
    if state._auto_reshard_after_forward or group not in state._fsdp_param_groups:
        return None
    mesh = group.post_forward_mesh_info
    if mesh is None or mesh == group.mesh_info:
        return mesh is not None
    return mesh.shard_mesh_size


def own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return a module's own parameters."""
    return [(leaf, parameter) for leaf, parameter in module._parameters.items() if parameter is not None]


def around(module: nn.Module, ids: set[int]) -> tuple[list[int], list[int]]:
    """Return the user's hooks that run before FSDP's on the way in, and after it on the way out."""
    enter, leave = list(module._forward_pre_hooks), list(module._forward_hooks)
    first = next(i for i, key in enumerate(enter) if key in ids)
    last = next(i for i, key in enumerate(leave) if key in ids)
    return enter[:first], leave[last + 1 :]
