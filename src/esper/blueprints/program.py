"""A blueprint built for one signature: a straight line of torch calls over named weights.

The same instructions are run one by one (eager), printed as TorchScript, traced by ``torch.export`` and
Inductor, and shipped as JSON in a saved model's ``rebuild.py``: there is one truth of what a kernel computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from esper.contracts import Signature

# Every function a program may call, by the name instructions use. Nothing else can be reached.
FUNCTIONS: dict[str, str] = {
    "linear": "torch.nn.functional.linear",
    "conv2d": "torch.nn.functional.conv2d",
    "pad": "torch.nn.functional.pad",
    "layer_norm": "torch.layer_norm",
    "group_norm": "torch.group_norm",
    "relu": "torch.relu",
    "gelu": "torch.nn.functional.gelu",
    "silu": "torch.nn.functional.silu",
    "tanh": "torch.tanh",
    "sigmoid": "torch.sigmoid",
    "softmax": "torch.softmax",
    "add": "torch.add",
    "mul": "torch.mul",
    "matmul": "torch.matmul",
    "mean": "torch.mean",
    "amax": "torch.amax",
    "cat": "torch.cat",
    "narrow": "torch.narrow",
    "transpose": "torch.transpose",
    "unflatten": "torch.unflatten",
    "flatten": "torch.flatten",
    "tril": "torch.tril",
    "ones_like": "torch.ones_like",
    "log": "torch.log",
}

# "%name" is a value, "@name" a weight, a list of either is a list of tensors; all else is a constant.
Argument: TypeAlias = "str | int | float | bool | tuple[int, ...] | tuple[str, ...] | None"
Form: TypeAlias = Callable[
    [Tensor, Sequence[Tensor]], Tensor
]  # a compiled program: (input, weights) -> output


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter and how it starts."""

    name: str
    shape: tuple[int, ...]
    start: Literal["uniform", "zeros", "ones"] = "uniform"  # uniform: torch's own bound, 1/√fan_in

    def draw(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
        """Return initial values; random ones come from torch's global stream."""
        made = torch.empty(self.shape, device=device, dtype=dtype)
        if self.start == "uniform":
            bound = 1 / math.sqrt(max(math.prod(self.shape[1:]), 1))
            return made.uniform_(-bound, bound)
        return made.fill_(0.0 if self.start == "zeros" else 1.0)


@dataclass(frozen=True, slots=True)
class Instruction:
    """``result = function(*arguments)``; ``node`` is the graph's node it comes from, for error messages."""

    result: str
    function: str  # a key of FUNCTIONS
    arguments: tuple[Argument, ...]
    node: str


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions in order; the input is ``%x``.

    Attributes:
        outgoing: Weights that start at zero and end the program, so that the kernel's output is zero at birth
            and proportional to their common scale.
    """

    signature: Signature
    weights: tuple[Weight, ...]
    instructions: tuple[Instruction, ...]
    result: str  # "%name"
    outgoing: tuple[str, ...]

    def run(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Run every instruction; ``weights`` are in the order of ``self.weights``."""
        values: dict[str, Tensor] = {"%x": x}
        for weight, tensor in zip(self.weights, weights, strict=True):
            values[f"@{weight.name}"] = tensor
        for one in self.instructions:
            given = [_resolve(argument, values) for argument in one.arguments]
            values[f"%{one.result}"] = function(one.function)(*given)
        return values[self.result]

    def parameter_count(self) -> int:
        """Count the numbers in all weights."""
        return sum(math.prod(weight.shape) for weight in self.weights)

    def to_json(self) -> dict[str, object]:
        """Return what a torch-only reader needs to run it."""
        return {
            "weights": [[w.name, list(w.shape)] for w in self.weights],
            "instructions": [
                [i.result, FUNCTIONS[i.function], [_plain(a) for a in i.arguments]] for i in self.instructions
            ],
            "result": self.result,
        }


def _resolve(argument: Argument, values: dict[str, Tensor]) -> Tensor | list[Tensor] | Argument:
    if isinstance(argument, str):
        return values[argument] if argument[:1] in "%@" else argument
    if isinstance(argument, tuple) and argument and isinstance(argument[0], str):
        return [values[str(name)] for name in argument]
    return argument


def _plain(argument: Argument) -> Argument | list[int | str]:
    return list(argument) if isinstance(argument, tuple) else argument


def _find(path: str) -> Callable[..., Tensor]:
    found: Any = torch
    for part in path.split(".")[1:]:
        found = getattr(found, part)
    return found


_CALLABLES = {name: _find(path) for name, path in FUNCTIONS.items()}


def function(name: str) -> Callable[..., Tensor]:
    """Return the torch function an instruction names."""
    return _CALLABLES[name]  # a dict, not functools.cache: Dynamo traces this line and warns of caches
