"""Record what a model really does: one run, every torch call, and which tensor fed which.

Symbolic tracing gives up at the first data-dependent ``if``; a recorded run does not. Nothing is installed in
the model: a ``TorchFunctionMode`` sees every call while the recording lasts, and layers are recognised by the
parameters they pass (norms that pass none, by hooks that last as long).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from esper.kasmina.recording.weightless import norms_noted

# Reads of facts about a tensor, not of its values; they do not make a second consumer.
METADATA = frozenset(
    "__get__ size dim stride numel nelement ndimension __len__ is_contiguous is_floating_point is_complex "
    "element_size get_device storage_offset type __hash__ __bool__ _is_view".split()
)


# Calls of layers: what they were given stays known, whether or not anything follows from it.
OPERATORS = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d".split()
)


SPOKEN = {"__getitem__": "indexing", "__get__": "an attribute (.T, say)"}


@dataclass(frozen=True, slots=True)
class Call:
    """One torch call: the function, its arguments as given, and the values it read and made."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: tuple[int, ...]  # values
    makes: tuple[int, ...]
    parameters: tuple[str, ...]  # names of the parameters and buffers it was given
    shape: torch.Size | None  # of the first tensor it made

    @property
    def spoken(self) -> str:
        """The call as its user writes it."""
        return SPOKEN.get(self.name) or self.name.strip("_")

    def argument(self, index: int, name: str, default: object = None) -> Any:
        """Return an argument that may have come by position or by name."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)


class Refused(Exception):
    """A place cannot grow; the message is the reason."""


@dataclass(slots=True)
class Recording:
    """The calls of one run; a value is a tensor at one moment, so an in-place call makes a new one."""

    calls: list[Call] = field(default_factory=list)
    readers: dict[int, list[int]] = field(default_factory=dict)  # value -> calls that read it
    uses: dict[str, list[int]] = field(default_factory=dict)  # parameter -> calls that were given it
    shapes: list[torch.Size] = field(default_factory=list)  # of each value
    outputs: frozenset[int] = frozenset()  # values the run returned
    makers: dict[int, int] = field(default_factory=dict)  # value -> the call that made it
    norms: dict[int, str] = field(default_factory=dict)  # call -> the norm without tensors that made it
    again: Callable[[], object] | None = None  # the run itself
    transformed: bool = False  # whether layers were called inside torch.func

    def settle(self, outputs: frozenset[int], run: Callable[[], object]) -> Recording:
        """Note what the run returned, and who made what."""
        self.outputs, self.again = outputs, run
        self.makers = {value: index for index, call in enumerate(self.calls) for value in call.makes}
        if outputs:
            self.forget_dead()
        return self

    def forget_dead(self) -> None:
        """Forget reads that lead to no layer and nothing the run returned: of a log, a hook, an average."""
        layers = {index for index, call in enumerate(self.calls) if call.name in OPERATORS}
        live, todo = set[int](), [self.makers[value] for value in self.outputs if value in self.makers]
        todo += layers
        while todo:
            index = todo.pop()
            if index not in live:
                live.add(index)
                todo.extend(self.makers[value] for value in self.calls[index].reads if value in self.makers)
        self.readers = {value: [r for r in read if r in live] for value, read in self.readers.items()}
        self.uses = {name: [u for u in used if u in live] for name, used in self.uses.items()}


class Recorder(TorchFunctionMode):
    """Fills a :class:`Recording` while it is active."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names  # id of a parameter or buffer -> its first name
        self.recording = Recording()
        self.values: dict[int, int] = {}  # id of a tensor -> its present value
        self.alive: list[Tensor] = []  # ids are only unique while the tensors live

    def value(self, tensor: Tensor) -> int:
        """Return the tensor's present value, a new one for a tensor not seen before."""
        if id(tensor) not in self.values:
            return self.renew(tensor)
        return self.values[id(tensor)]

    def renew(self, tensor: Tensor) -> int:
        """Give the tensor a new value."""
        self.alive.append(tensor)
        self.recording.shapes.append(tensor.shape)
        self.values[id(tensor)] = len(self.recording.shapes) - 1
        return self.values[id(tensor)]

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run the call and write it down."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        given = tensors((args, kwargs))
        named = tuple(self.names[id(t)] for t in given if id(t) in self.names)
        reads = tuple(self.value(t) for t in given if id(t) not in self.names)
        self.recording.transformed |= name in OPERATORS and any(map(is_functorch_wrapped_tensor, given))
        result = func(*args, **kwargs)
        made = tensors(result)
        if not made and name in METADATA:
            return result
        mutated = (
            given[:1] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else []
        )
        makes = tuple(
            self.renew(t) for t in {id(t): t for t in [*made, *mutated]}.values() if id(t) not in self.names
        )
        index = len(self.recording.calls)
        shape = made[0].shape if made else None
        self.recording.calls.append(Call(name, func, args, kwargs, reads, makes, named, shape))
        for read in reads:
            self.recording.readers.setdefault(read, []).append(index)
        for parameter in named:
            self.recording.uses.setdefault(parameter, []).append(index)
        return result


def tensors(tree: object) -> list[Tensor]:
    """List the tensors in a nest of containers."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Map the id of every parameter and buffer to its first name."""
    named: Iterable[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in named}


def record(model: nn.Module, run: Callable[[], object]) -> Recording:
    """Record one run.

    Args:
        model: The module whose parameters and buffers are recognised.
        run: Function that calls the model once, for example ``lambda: loss_fn(model, batch)``.
    """
    recorder = Recorder(tensor_names(model))
    with norms_noted(model, recorder.recording.calls, recorder.recording.norms), recorder:
        result = run()
    return recorder.recording.settle(frozenset(recorder.value(t) for t in tensors(result)), run)
