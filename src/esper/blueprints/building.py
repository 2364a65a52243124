"""What an operator gets to work with while a graph is built for one signature."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from esper.blueprints import dimensions
from esper.blueprints.program import Argument, Instruction, Weight
from esper.contracts import Signature
from esper.errors import BlueprintError

MAX_NUMBERS = 1 << 26  # numbers in all weights: 256 MiB in float32

Constant = str | int | float | bool
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """What a node made: the name instructions call it by, and its shape on the example at hand."""

    name: str
    shape: Shape

    @property
    def channels_axis(self) -> int:
        """(batch, c), (batch, time, c) or (batch, c, h, w)."""
        return 1 if len(self.shape) == 4 else len(self.shape) - 1

    @property
    def channels(self) -> int:
        """Width along the channels' axis."""
        return self.shape[self.channels_axis]

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes that are neither batch nor channels; none for vectors."""
        return tuple(axis for axis in range(1, len(self.shape)) if axis != self.channels_axis)

    def with_channels(self, channels: int) -> Shape:
        """Return this shape with another width."""
        axis = self.channels_axis
        return (*self.shape[:axis], channels, *self.shape[axis + 1 :])


@dataclass(slots=True)
class Building:
    """A program in the making, on one example size."""

    graph: str
    signature: Signature
    hidden: int
    weights: list[Weight] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)  # the node of each weight
    instructions: list[Instruction] = field(default_factory=list)
    outgoing: list[str] = field(default_factory=list)
    numbers: int = 0

    def widths(self) -> dict[str, int]:
        """Return what the symbols of dimensions stand for."""
        site = self.signature
        return {
            "inputs": site.inputs,
            "outputs": site.outputs,
            "hidden": self.hidden,
            "groups": site.groups,
        }


@dataclass(slots=True)
class Step:
    """One node being built: resolves attributes, declares weights, emits instructions, refuses."""

    building: Building
    node: str
    operator: str
    attributes: Mapping[str, Constant]
    last: bool  # its weights are the ones that start at zero

    @property
    def signature(self) -> Signature:
        """The tensors the kernel must fit."""
        return self.building.signature

    def dimension(self, attribute: str) -> int:
        """Return an attribute that is a dimension, as a number."""
        given = self.attributes[attribute]
        assert isinstance(given, int | str)
        size = dimensions.resolve(given, self.building.widths())
        return self.limited(size, f"{attribute} {given!r}")

    def limited(self, size: int, what: str) -> int:
        """Return a size, or refuse one no layer has."""
        if size > dimensions.LARGEST:
            self.refuse(f"{what} is {size:.4g}; at most {dimensions.LARGEST} is allowed")
        return size

    def integer(self, attribute: str) -> int:
        """Return an attribute that is a number without a symbol."""
        given = self.attributes[attribute]
        assert isinstance(given, int)
        return given

    def weight(
        self, suffix: str, shape: Shape, start: Literal["uniform", "zeros", "ones"] = "uniform"
    ) -> str:
        """Declare a weight and return its name in instructions.

        The last affine's weights start at zero whatever ``start`` says.
        """
        self.building.numbers += math.prod(shape)
        if self.building.numbers > MAX_NUMBERS:
            self.refuse(f"with a weight of {shape} the graph holds more than {MAX_NUMBERS} numbers")
        name = f"{self.node}_{suffix}"  # a dot is not allowed in a parameter's name
        self.building.weights.append(Weight(name, shape, "zeros" if self.last else start))
        self.building.owners.append(self.node)
        if self.last:
            self.building.outgoing.append(name)
        return f"@{name}"

    def emit(self, function: str, *arguments: Argument, shape: Shape) -> Value:
        """Append an instruction; the numbered result keeps clear of every keyword."""
        result = f"{self.node}_{len(self.building.instructions)}"
        self.building.instructions.append(Instruction(result, function, arguments, self.node))
        return Value(f"%{result}", shape)

    def rank(self, value: Value, *allowed: int) -> None:
        """Refuse a value of another rank."""
        if len(value.shape) not in allowed:
            names = " or ".join(RANKS[rank] for rank in allowed)
            found = RANKS.get(len(value.shape), f"a tensor of rank {len(value.shape)}")
            self.refuse(f"it takes {names}, not {found}")

    def same(self, values: Sequence[Value], what: str) -> None:
        """Refuse values of unequal shapes."""
        if len({value.shape for value in values}) > 1:
            self.refuse(f"{what}, not {' and '.join(str(value.shape) for value in values)}")

    def refuse(self, reason: str) -> NoReturn:
        """Raise, naming the graph, the node and the reason.

        Raises:
            BlueprintError: Always.
        """
        raise BlueprintError(f"graph {self.building.graph!r}, node {self.node!r} ({self.operator}): {reason}")


RANKS = {2: "a vector (batch, c)", 3: "a sequence (batch, time, c)", 4: "an image (batch, c, h, w)"}
