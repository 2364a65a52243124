"""The whitelist: every operator a graph may name, what it takes, and what it does to an affine map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from esper.blueprints import dimensions, elementwise
from esper.blueprints.attention import attention
from esper.blueprints.building import Constant, Value
from esper.blueprints.convolution import GEOMETRIES, conv

MAX_INPUTS = 8


@dataclass(frozen=True, slots=True)
class Attribute:
    """One setting of an operator; without a default it must be given."""

    kind: Literal["dimension", "integer", "number", "flag", "choice"]
    default: Constant | None = None
    highest: int = 16  # of an integer
    lowest: int = 1
    choices: tuple[str, ...] = ()

    def fault(self, value: object) -> str | None:
        """Say what is wrong with a value; None if it may be given."""
        if self.kind == "dimension":
            return dimensions.fault(value)
        if self.kind == "choice":
            return None if value in self.choices else f"must be one of {', '.join(self.choices)}"
        if self.kind == "flag":
            return None if isinstance(value, bool) else "must be true or false"
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number"
        if self.kind == "number":
            return None if 1e-4 <= abs(value) <= 1e4 else "must lie in ±1e-4…1e4"
        if not isinstance(value, int) or not self.lowest <= value <= self.highest:
            return f"must be a whole number in {self.lowest}…{self.highest}"
        return None


@dataclass(frozen=True, slots=True)
class Operator:
    """What a graph's node does.

    Attributes:
        build: Checks shapes and emits instructions: ``(step, *inputs) -> value``.
        inputs: Least and most inputs.
        affine: An affine map of its inputs taken together, whatever its weights.
        role: ``last`` may end a graph, with weights that start at zero; ``linear`` may follow the last
            affine, because it maps zero to zero and scales with its input; ``inner`` may do neither.
        mixes: Positions besides its own that an output depends on: ``past``, ``all``.
    """

    build: Callable[..., Value]
    inputs: tuple[int, int] = (1, 1)
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    affine: bool = False
    role: Literal["last", "linear", "inner"] = "inner"
    mixes: Literal["none", "past", "all"] = "none"


_WIDTH = Attribute("dimension")
_BIAS = Attribute("flag", True)
_GROUPS = Attribute("dimension", 1)
_OVER = Attribute("choice", choices=("channels", "positions"))

OPERATORS: dict[str, Operator] = {
    "affine": Operator(
        elementwise.affine, attributes={"outputs": _WIDTH, "bias": _BIAS}, affine=True, role="last"
    ),
    "conv": Operator(
        conv,
        attributes={
            "channels": _WIDTH,
            "kernel": Attribute("integer", 3),
            "dilation": Attribute("integer", 1),
            "groups": _GROUPS,
            "geometry": Attribute("choice", "same", choices=GEOMETRIES),
            "bias": _BIAS,
        },
        affine=True,
        role="last",
        mixes="all",
    ),
    "layer_norm": Operator(elementwise.layer_norm),
    "group_norm": Operator(elementwise.group_norm, attributes={"groups": _GROUPS}, mixes="all"),
    **{name: Operator(elementwise.activation(name)) for name in ("relu", "gelu", "silu", "tanh", "sigmoid")},
    "softmax": Operator(elementwise.softmax, attributes={"over": _OVER}),
    "add": Operator(elementwise.combine("add"), (2, 2), affine=True),
    "mul": Operator(elementwise.combine("mul"), (2, 2)),
    "scale": Operator(elementwise.scale, attributes={"by": Attribute("number")}, affine=True, role="linear"),
    "mean": Operator(elementwise.pool("mean"), attributes={"over": _OVER}, affine=True),
    "amax": Operator(elementwise.pool("amax"), attributes={"over": _OVER}),
    "concat": Operator(elementwise.concat, (2, MAX_INPUTS), affine=True),
    "split": Operator(
        elementwise.split,
        attributes={"parts": Attribute("integer", lowest=2), "index": Attribute("integer", lowest=0)},
        affine=True,
    ),
    "transpose": Operator(elementwise.transpose, affine=True, role="linear", mixes="all"),
    "matmul": Operator(elementwise.matmul, (2, 2), mixes="all"),
    "attention": Operator(
        attention,
        (3, 3),
        {"heads": _GROUPS, "causal": Attribute("flag", False)},
        mixes="all",
    ),
}
