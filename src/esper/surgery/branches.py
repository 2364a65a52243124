"""Branches that stay: from the moment they are kept they are plain torch, and nothing of Esper's is needed.

The kernel's weights become parameters of the layer whose output it is added to: ``parameters()``, ``to``,
``state_dict`` and ``deepcopy`` see them, no existing key changes, and no container gets one more child. A
forward hook adds what they compute; it is a ``torch.fx.GraphModule`` (see adding.py) that holds no weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import MethodType
from typing import Literal

from torch import _assert, nn
from torch.utils.hooks import RemovableHandle

from esper.blueprints.kernel import GraphKernel
from esper.errors import SurgeryError
from esper.surgery.adding import DIRECT, Passing, adding, keeping
from esper.surgery.isolation.seam import plain_class

PREFIX = "grown"  # of the parameters' names
PREPARE = "__prepare_scriptable__"
UNSCRIPTED = "torch.jit.script cannot hold the forward hook that adds a grown branch; use torch.export"


def weight_name(branch: str, weight: str) -> str:
    """Return the name under which a layer holds a weight of a branch."""
    return f"{PREFIX}_{branch}_{weight}"


def attach(
    name: str,
    kernel: GraphKernel,
    ends: tuple[nn.Module, nn.Module],
    port: Literal["parallel", "serial"],
    passing: Passing = DIRECT,
) -> Callable[[], None]:
    """Let the layer at the end of a place add a kernel's output to its own from now on.

    Args:
        name: Name of the branch; no other branch of the layer has it.
        kernel: Kernel whose parameters, the objects themselves, the layer gets.
        ends: Entry and exit of the place.
        port: Input of the kernel: what the first of them is given, or what the last one returns.
        passing: Positions of these tensors in calls.

    Returns:
        A function that takes the branch out again; the layers are exactly as before then.

    Raises:
        SurgeryError: The layer has something else of such a name; nothing was changed.
    """
    entry, exit_ = ends
    names = {weight.name: weight_name(name, weight.name) for weight in kernel.program.weights}
    if taken := [own for own in names.values() if hasattr(exit_, own)]:
        raise SurgeryError(
            f"the {plain_class(exit_).__name__} has an attribute {taken[0]!r} of its own, the name that a "
            "weight of the branch would have; rename it to grow branches"
        )
    with ExitStack() as back:
        for weight, own in names.items():
            exit_.register_parameter(own, kernel.get_parameter(weight))
            back.callback(exit_._parameters.pop, own)
        apart = port == "parallel" and entry is not exit_
        hook: Callable[..., object] = adding(kernel.program, names, passing, port == "serial", apart)
        if apart:
            kept: dict[str, object] = {}  # empty between passes, so that the model can be copied
            hook = partial(hook, kept)
            first: Callable[..., object] = partial(keeping(passing), kept)
            back.callback(entry.register_forward_pre_hook(first, with_kwargs=True).remove)
            back.callback(mark(entry))
        back.callback(hooked(exit_, hook).remove)
        back.callback(mark(exit_))
        return back.pop_all().close


def hooked(module: nn.Module, hook: Callable[..., object]) -> RemovableHandle:
    """Register a forward hook behind all that there are."""
    return module.register_forward_hook(hook, with_kwargs=True)


def mark(module: nn.Module) -> Callable[[], None]:
    """Let torch's compiler tell a module with a branch from its like.

    It does not guard on hooks: of two blocks of one class, compiled each by itself, the second ran the graph
    of the first, without its branch and without a word (tried, torch 2.13). It does guard on ``forward`` of
    an instance, so the module gets its class's own as one.

    And let ``torch.jit.script`` say why it cannot: of a hook that is no function it says only that it lacks a
    ``__name__``. It calls what is asked for here, by torch's own protocol.

    Returns:
        A function that takes it away again.
    """
    own = {
        "forward": MethodType(plain_class(module).forward, module),
        PREPARE: partial(_assert, False, UNSCRIPTED),
    }
    added = {
        name: one for name, one in own.items() if name not in module.__dict__
    }  # not a branch's or the user's
    module.__dict__.update(added)

    def unmark() -> None:
        for name in added:
            del module.__dict__[name]

    return unmark
