"""A number of the model's own between two layers: a temperature, a gate, the one slope of a PReLU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from esper.kasmina.recording.between import ELEMENTWISE, Slot, Step, function
from esper.kasmina.recording.recorder import Call

ONE_EACH = ELEMENTWISE | {"prelu"}


@dataclass(frozen=True)
class Scalar(Step):
    """An elementwise call that reads tensors of one entry; they are read anew at every call."""

    func: str
    args: tuple[object, ...]  # Slot(0) is the input, a Held one of the model's own numbers
    kwargs: Mapping[str, object]

    def run(self, x: Tensor, own: Mapping[str, Tensor], training: bool) -> Tensor:
        """Make the same call on fewer channels."""
        leaves, shape = tree_flatten((self.args, dict(self.kwargs)))
        filled = [x if isinstance(leaf, Slot) else held(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(filled, shape)
        made: Tensor = function(self.func)(*args, **kwargs)
        return made


@dataclass(frozen=True)
class Held:
    """A tensor of a module."""

    name: str
    module: nn.Module = field(compare=False)


def held(leaf: object) -> object:
    """Return the tensor a leaf stands for, or the leaf."""
    return getattr(leaf.module, leaf.name) if isinstance(leaf, Held) else leaf


def scalar(call: Call, modules: Mapping[str, nn.Module]) -> Scalar | None:
    """Make a step of an elementwise call that owns only tensors of one entry; None of another."""
    names = iter(call.parameters)
    leaves, shape = tree_flatten((call.args, call.kwargs))
    owners = {id(tensor): path for path, tensor in owned(call, modules)}
    if call.name not in ONE_EACH or len(owners) != len(set(call.parameters)):
        return None
    filled: list[object] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            filled.append(leaf)
        elif id(leaf) in owners:
            path, _, own = owners[id(leaf)].rpartition(".")
            filled.append(Held(own, modules[path]))
        else:
            filled.append(Slot(0))
    args, kwargs = tree_unflatten(filled, shape)
    return Scalar(f"{call.name} {next(names)}", call.name, args, kwargs)


def owned(call: Call, modules: Mapping[str, nn.Module]) -> list[tuple[str, Tensor]]:
    """List the tensors of one entry that a call was given, by their names in the model."""
    found: list[tuple[str, Tensor]] = []
    for name in call.parameters:
        path, _, own = name.rpartition(".")
        tensor = getattr(modules.get(path), own, None)
        if isinstance(tensor, Tensor) and tensor.numel() == 1:
            found.append((name, tensor))
    return found
