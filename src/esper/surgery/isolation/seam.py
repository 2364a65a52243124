"""Step into a module's call without wrapping it: its class is a subclass while a seed is awake.

Measured (docs/decisions.md): a resident wrapper costs 1.7 µs a call and renames keys, a forward hook 1.1 µs
and is silently ignored by a model that was compiled before; a class swapped only while needed costs nothing
when dormant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Protocol, SupportsIndex, cast

from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._pytree import tree_flatten, tree_unflatten

from esper.surgery.isolation.acting import held, refuse_reading, take
from esper.surgery.isolation.attributes import SEAM
from esper.surgery.isolation.contexts import slow_path

AFTERWARDS = "do so before growth begins, or use torch.export, which calls it"


class Gateway(Protocol):
    """What a seam hands the module's input and output to."""

    def enter(self, x: Tensor | None) -> None:
        """See the input of the entry layer: its first floating-point tensor, None where it has none."""

    def leave(self, y: Tensor) -> Tensor:
        """See the output of the exit layer and return what takes its place."""


@cache
def seam_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of ``base`` whose calls pass through the seam."""

    def call(self: nn.Module, *args: object, **kwargs: object) -> object:
        gateways, core = self.__dict__[SEAM]
        if args and isinstance(args[0], Proxy):
            refuse_reading(gateways, "torch.fx", AFTERWARDS)
            return base.__call__(self, *args, **kwargs)  # a tracer knows modules by identity
        if type(self) is not seam:  # parametrised while it was open: its tensors are the new class's
            core = partial(base.__call__, self)
        for role, gateway in gateways:
            if role == "entry":
                gateway.enter(first_tensor(args, kwargs))
            elif role == "slow":
                core = partial(slowly, core)
        y = core(*args, **kwargs)
        for role, gateway in gateways:
            if role == "exit":
                y = gateway.leave(y) if isinstance(y, Tensor) else replaced(y, gateway.leave)
        return y

    def reduce(self: nn.Module, protocol: SupportsIndex) -> tuple[object, ...]:
        gateways, _ = self.__dict__[SEAM]
        state = base.__getstate__(self)  # a recurrent layer leaves out its weak references
        return revive, (base,), {**(state if isinstance(state, dict) else {}), SEAM: gateways}

    def set_state(self: nn.Module, state: dict[str, object]) -> None:
        base.__setstate__(self, state)
        join(self, base, cast("tuple[tuple[str, Gateway], ...]", state[SEAM]))

    def save(self: nn.Module, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        base._save_to_state_dict(self, destination, prefix, keep_vars)
        for key, tensor in held(gateways_of(self)).items():
            destination[prefix + key] = tensor if keep_vars else tensor.detach()

    def load(
        self: nn.Module,
        state: dict[str, object],
        prefix: str,
        metadata: object,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        take(held(gateways_of(self)), state, prefix, errors)
        base._load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors)

    def prepare(self: nn.Module) -> nn.Module:
        refuse_reading(gateways_of(self), "torch.jit.script", AFTERWARDS)
        return self

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    calls = {"__call__": call, "__reduce_ex__": reduce, "__setstate__": set_state}
    states = {"_save_to_state_dict": save, "_load_from_state_dict": load, "__prepare_scriptable__": prepare}
    seam = type(base.__name__, (base,), {**names, **calls, **states, "_esper_base": base})
    return seam


def slowly(core: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Call a module whose fast path would pass its layers by, and their seams with them."""
    with slow_path():
        return core(*args, **kwargs)


def first_tensor(args: tuple[object, ...], kwargs: dict[str, object]) -> Tensor | None:
    """Return the first floating-point tensor a layer was called with."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():  # the usual call: no flattening
        return args[0]
    leaves = tree_flatten((args, kwargs))[0]
    return next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)


def replaced(tree: object, change: Callable[[Tensor], Tensor]) -> object:
    """Return a nest of outputs with its first floating-point tensor changed, if it has one."""
    leaves, nest = tree_flatten(tree)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            leaves[index] = change(leaf)
            return tree_unflatten(leaves, nest)
    return tree


def revive(base: type[nn.Module]) -> nn.Module:
    """Begin a copied or unpickled module; its gateways come with its state: they lead back to the module."""
    return object.__new__(seam_class(base))


def join(module: nn.Module, base: type[nn.Module], gateways: tuple[tuple[str, Gateway], ...]) -> None:
    """Give a module its gateways and the plain object behind them."""
    core = object.__new__(base)
    core.__dict__ = (
        module.__dict__
    )  # shared, so parameters, hooks and mode follow; a copy went stale (tested)
    module.__dict__[SEAM] = (gateways, core)


def attach(module: nn.Module, gateways: tuple[tuple[str, Gateway], ...]) -> None:
    """Swap the class of a module, which must be plain."""
    base = type(module)
    join(module, base, gateways)
    module.__class__ = seam_class(base)


def is_open(module: nn.Module) -> bool:
    """Tell whether a module has a seam."""
    return SEAM in module.__dict__


def gateways_of(module: nn.Module) -> tuple[tuple[str, Gateway], ...]:
    """Return a module's gateways and their roles; none where it is plain."""
    return module.__dict__[SEAM][0] if is_open(module) else ()


def core_of(module: nn.Module) -> nn.Module:
    """Return the plain object behind an open seam; they share one ``__dict__``."""
    core: nn.Module = module.__dict__[SEAM][1]
    return core


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class a module has without its seam."""
    return type(module.__dict__[SEAM][1]) if is_open(module) else type(module)


def open_seam(module: nn.Module, role: str, gateway: Gateway) -> Callable[[], None]:
    """Let ``gateway`` see a module's input ("entry") or output ("exit").

    With "slow" it sees nothing, but the module takes no fast path past seams inside it.

    Returns:
        A function that takes this gateway out again; with the last one the module is exactly as before.
    """
    if is_open(module):
        gateways, core = module.__dict__[SEAM]
        module.__dict__[SEAM] = ((*gateways, (role, gateway)), core)
    else:
        attach(module, ((role, gateway),))

    return partial(close_seam, module, role, gateway)


def look_through(module: nn.Module, role: str, gateway: Gateway) -> Callable[[], None]:
    """Let ``gateway`` see a module's input or output for a few passes, by a hook: its class stays what it is.

    A loss may ask for ``type(layer)``, a class may keep a register of its subclasses. It stands behind the
    user's own hooks, so it sees what the layer reads and gives in the end. Where a seam is open already, it
    joins that, behind the branch.
    """
    if is_open(module):
        return open_seam(module, role, gateway)
    if role == "entry":
        return module.register_forward_pre_hook(Entering(gateway), with_kwargs=True).remove
    return module.register_forward_hook(Leaving(gateway)).remove


class Entering:
    """A hook that shows a gateway what a module is called with."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Show its first tensor."""
        self.gateway.enter(first_tensor(args, kwargs))


class Leaving:
    """A hook that lets a gateway change what a module returns."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    def __call__(self, module: nn.Module, args: object, result: object) -> object:
        """Return what takes its place."""
        leave = self.gateway.leave
        return leave(result) if isinstance(result, Tensor) else replaced(result, leave)


def close_seam(module: nn.Module, role: str, gateway: Gateway) -> None:
    """Take one gateway out; a module that is copied takes its own closing with it, as a closure would not."""
    gateways, core = module.__dict__[SEAM]
    left = tuple(g for g in gateways if g != (role, gateway))
    if left:
        module.__dict__[SEAM] = (left, core)
    else:
        module.__class__ = rebased(type(module), type(core))
        del module.__dict__[SEAM]


def rebased(found: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Return a module's class without its seam; what was made upon that since stands on the plain class."""
    if found is seam_class(base):
        return base
    below = rebased(found.__bases__[0], base)
    own = {k: v for k, v in vars(found).items() if k not in ("__dict__", "__weakref__")}
    return type(found.__name__, (below, *found.__bases__[1:]), own)
