"""What Esper knows of FSDP2's insides, in one place: torch says how to shard a module, not how to undo it.

Read in ``torch/distributed/fsdp/_fully_shard`` of torch 2.13; 2.11 is the oldest torch Esper runs on. Every
private name is checked before anything is changed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from esper.errors import SurgeryError
from esper.surgery.isolation.attributes import SEAM
from esper.surgery.isolation.seam import attach, is_open

READ_IN = "2.13"

# FSDP's own objects, of classes torch does not export: a module's state, its groups, a group's parameter.
State: TypeAlias = Any
Group: TypeAlias = Any
Parameter: TypeAlias = Any
Hook: TypeAlias = Callable[..., object]
# What each must have.
STATE = (
    "_modules _fsdp_param_groups _mp_policy _device _auto_reshard_after_forward _training_state "
    "_pre_forward_hook_handle _post_forward_hook_handle _state_ctx _states_to_forward_prefetch "
    "_states_to_backward_prefetch _cast_forward_inputs _cast_output_dtype _pre_forward _post_forward"
).split()
GROUP = (
    "fsdp_params mesh_info post_forward_mesh_info offload_policy is_unsharded "
    "_module_to_pre_save_state_dict_hook_handle _module_to_pre_load_state_dict_hook_handle"
).split()
PARAMETER = "sharded_param fsdp_placement is_dtensor _module_info _post_load_hook_handle".split()

MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")  # on every module below, for the compiler


def states(model: nn.Module) -> list[State]:
    """Return FSDP's state objects below a model, in the order in which ``fully_shard`` made them.

    Raises:
        SurgeryError: This torch's FSDP is not the one Esper knows, or a pass is under way.
    """
    found: dict[int, State] = {}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = state_of(module)
            found[id(state)] = state
    for state in found.values():
        demand(state, STATE)
        for group in state._fsdp_param_groups:
            demand(group, GROUP)
            for parameter in group.fsdp_params:
                demand(parameter, PARAMETER)
    refuse_midway(found.values())
    # Handles are numbered as they are given out, so their numbers tell the order of the calls.
    return sorted(found.values(), key=lambda state: handles(state)[0].id)


def state_of(module: FSDPModule) -> State:
    """Return the state of a sharded module.

    Raises:
        SurgeryError: This torch's FSDP keeps it elsewhere.
    """
    if not hasattr(module, "_get_fsdp_state"):
        raise unknown("FSDPModule._get_fsdp_state")
    return module._get_fsdp_state()


def demand(thing: object, names: Iterable[str]) -> None:
    """Refuse a torch whose FSDP lacks one of ``names``."""
    for name in names:
        if not hasattr(thing, name):
            raise unknown(f"{type(thing).__name__}.{name}")


def unknown(name: str) -> SurgeryError:
    """Say which private name is missing."""
    return SurgeryError(
        f"torch {torch.__version__} has no {name}, by which FSDP2 of torch {READ_IN} is undone; use "
        "DDP, or the torch named here"
    )


def refuse_midway(found: Iterable[State]) -> None:
    """Refuse to act inside a forward or backward pass."""
    busy = [state for state in found if state._training_state.name != "IDLE"]
    if busy:
        raise SurgeryError(
            f"a sharded {type(busy[0]._modules[0]).__name__} is in {busy[0]._training_state.name.lower()}; "
            "growth acts between passes: call growth.step after the optimizer's line"
        )


def handles(state: State) -> list[RemovableHandle]:
    """Return the handles of a state's forward hooks, oldest first."""
    given = {id(h): h for h in (state._pre_forward_hook_handle, state._post_forward_hook_handle)}
    return list(chain.from_iterable(getattr(handle, "handles", (handle,)) for handle in given.values()))


def state_dict_handles(state: State) -> Iterator[tuple[nn.Module, RemovableHandle, bool]]:
    """Yield FSDP's hooks on ``state_dict`` (False) and ``load_state_dict`` (True), with their modules."""
    for group in state._fsdp_param_groups:
        for module, handle in group._module_to_pre_save_state_dict_hook_handle.items():
            yield module, handle, False
        for module, handle in group._module_to_pre_load_state_dict_hook_handle.items():
            yield module, handle, True


def parameters(state: State) -> Iterator[Parameter]:
    """Yield FSDP's records of the parameters a state looks after."""
    for group in state._fsdp_param_groups:
        yield from group.fsdp_params


def owners(parameter: Parameter) -> list[tuple[nn.Module, str]]:
    """Return every module and name under which a parameter is found: tied ones have several."""
    info = parameter._module_info
    demand(info, ("module", "param_name", "shared_modules", "shared_param_names"))
    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
    return [(info.module, info.param_name), *shared]


@contextmanager
def quiet(state: State) -> Iterator[None]:
    """Keep FSDP's hooks from communicating for a while; of mixed precision, the casts stay."""

    def enter(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return state._cast_forward_inputs(args, kwargs)

    def leave(module: nn.Module, args: object, output: object) -> object:
        return state._cast_output_dtype(output)

    if is_quiet(state):  # inside another one
        yield
        return
    with ExitStack() as back:
        ids = {handle.id for handle in handles(state)}
        for module in state._modules:
            exchange(module._forward_pre_hooks, ids, enter, back)
            exchange(module._forward_hooks, ids, leave, back)
        for module, handle, loads in state_dict_handles(state):
            hooks = module._load_state_dict_pre_hooks if loads else module._state_dict_pre_hooks
            exchange(hooks, {handle.id}, refuse_loading if loads else ignore, back)
        # Methods given to register_fsdp_forward_method look these two up at every call.
        for name, method in (("_pre_forward", enter), ("_post_forward", leave)):
            state.__dict__[name] = method
            back.callback(state.__dict__.pop, name)
        yield


def is_quiet(state: State) -> bool:
    """Tell whether FSDP's hooks are kept from communicating."""
    return "_pre_forward" in state.__dict__


def exchange(hooks: MutableMapping[int, Hook], ids: set[int], hook: Hook, back: ExitStack) -> None:
    """Put a hook in the place of others; their order stays."""
    for key in ids & hooks.keys():
        back.callback(hooks.__setitem__, key, hooks[key])
        hooks[key] = hook


def ignore(*args: object, **kwargs: object) -> None:
    """Do nothing, in place of a hook."""


def refuse_loading(*args: object, **kwargs: object) -> None:
    """Stand in for FSDP's hook before weights are loaded."""
    raise SurgeryError("weights loaded inside gathered() would be lost at its end; load them outside")


@contextmanager
def peeled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Take seams off for a while: FSDP and a seam both swap a module's class; the seam must be outermost."""
    taken = [(module, module.__dict__[SEAM][0]) for module in modules if is_open(module)]
    for module, _ in taken:
        module.__class__ = type(module.__dict__[SEAM][1])
        del module.__dict__[SEAM]
    try:
        yield
    finally:
        for module, gateways in taken:
            attach(module, gateways)


def strip(state: State) -> None:
    """Undo ``fully_shard`` on the modules of one state: hooks, classes and marks; not the parameters."""
    for handle in (*handles(state), *(handle for _, handle, _ in state_dict_handles(state))):
        handle.remove()
    for parameter in parameters(state):
        parameter._post_load_hook_handle.remove()
    contract, composable = private("_composable.contract"), private("_composable_state")
    demand(contract, ("STATE_KEY", "REGISTRY_KEY"))
    demand(composable, ("_module_state_mapping",))
    for module in state._modules:
        composable._module_state_mapping.pop(module, None)
        states_of = module.__dict__[contract.STATE_KEY]
        for api in [api for api, held in states_of.items() if held is state]:
            del states_of[api]
            module.__dict__[contract.REGISTRY_KEY].pop(api.__name__, None)
        for key in (contract.STATE_KEY, contract.REGISTRY_KEY):
            if not module.__dict__[key]:
                del module.__dict__[key]
        module.__class__ = type(module).__mro__[type(module)._orig_cls_mro_index]
        for inner in module.modules():
            for mark in MARKS:
                inner.__dict__.pop(mark, None)


def private(path: str) -> Any:
    """Import a private module of torch.distributed."""
    try:
        return importlib.import_module(f"torch.distributed.{path}")
    except ImportError as missing:
        raise unknown(f"torch.distributed.{path}") from missing
