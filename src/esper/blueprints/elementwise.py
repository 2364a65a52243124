"""The small operators: activations, sums and products, norms, pooling, parts and joins."""

from __future__ import annotations

from collections.abc import Callable

from esper.blueprints.building import Shape, Step, Value

EPSILON = 1e-5  # torch's default for norms


def affine(step: Step, x: Value) -> Value:
    """Multiply the channels of a vector or sequence by a matrix; images have ``conv``."""
    step.rank(x, 2, 3)
    outputs = step.dimension("outputs")
    weight = step.weight("weight", (outputs, x.channels))  # (out, in)
    bias = step.weight("bias", (outputs,), "zeros") if step.attributes["bias"] else None
    return step.emit("linear", x.name, weight, bias, shape=x.with_channels(outputs))


def layer_norm(step: Step, x: Value) -> Value:
    """Normalise every vector by itself; no batch statistics, so training and evaluation agree."""
    step.rank(x, 2, 3)
    weight = step.weight("weight", (x.channels,), "ones")
    bias = step.weight("bias", (x.channels,), "zeros")
    return step.emit("layer_norm", x.name, (x.channels,), weight, bias, EPSILON, shape=x.shape)


def group_norm(step: Step, x: Value) -> Value:
    """Normalise an image by groups of channels; no batch statistics."""
    step.rank(x, 4)
    groups = step.dimension("groups")
    if x.channels % groups:
        step.refuse(f"groups {groups} must divide the {x.channels} channels")
    weight = step.weight("weight", (x.channels,), "ones")
    bias = step.weight("bias", (x.channels,), "zeros")
    return step.emit("group_norm", x.name, groups, weight, bias, EPSILON, shape=x.shape)


def activation(function: str) -> Callable[[Step, Value], Value]:
    """Return the operator that applies a function to every number."""

    def apply(step: Step, x: Value) -> Value:
        return step.emit(function, x.name, shape=x.shape)

    return apply


def combine(function: str) -> Callable[[Step, Value, Value], Value]:
    """Return the operator that joins two tensors number by number; axes of size 1 are repeated."""

    def apply(step: Step, a: Value, b: Value) -> Value:
        return step.emit(function, a.name, b.name, shape=_broadcast(step, a, b))

    return apply


def _broadcast(step: Step, a: Value, b: Value) -> Shape:
    pairs = list(zip(a.shape, b.shape, strict=False))
    if len(a.shape) != len(b.shape) or any(m != n and 1 not in (m, n) for m, n in pairs):
        step.refuse(f"{a.shape} and {b.shape} do not go together")
    return tuple(max(m, n) for m, n in pairs)


def scale(step: Step, x: Value) -> Value:
    """Multiply by a constant."""
    by = step.attributes["by"]
    return step.emit("mul", x.name, float(by), shape=x.shape)


def pool(function: str) -> Callable[[Step, Value], Value]:
    """Return the operator that reduces the channels or the positions to one, and keeps the axes."""

    def apply(step: Step, x: Value) -> Value:
        axes = _axes(step, x)
        shape = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        return step.emit(function, x.name, axes, True, shape=shape)

    return apply


def softmax(step: Step, x: Value) -> Value:
    """Turn channels, or the time steps of a sequence, into weights that sum to one."""
    axes = _axes(step, x)
    if len(axes) != 1:
        step.refuse("a softmax runs over one axis; an image has two of positions")
    return step.emit("softmax", x.name, axes[0], shape=x.shape)


def _axes(step: Step, x: Value) -> tuple[int, ...]:
    if step.attributes["over"] == "channels":
        return (x.channels_axis,)
    if not x.positions:
        step.refuse("a vector has no positions")
    return x.positions


def concat(step: Step, *values: Value) -> Value:
    """Put values side by side along their channels."""
    first = values[0]
    if any(value.with_channels(1) != first.with_channels(1) for value in values):
        step.refuse(f"{', '.join(str(value.shape) for value in values)} differ in more than their channels")
    total = step.limited(sum(value.channels for value in values), "the joined width")
    names = tuple(value.name for value in values)
    return step.emit("cat", names, first.channels_axis, shape=first.with_channels(total))


def split(step: Step, x: Value) -> Value:
    """Take one of several equal parts of the channels."""
    parts, index = step.integer("parts"), step.integer("index")
    if x.channels % parts or index >= parts:
        step.refuse(f"there is no part {index} of {parts} in {x.channels} channels")
    width = x.channels // parts
    return step.emit("narrow", x.name, x.channels_axis, index * width, width, shape=x.with_channels(width))


def transpose(step: Step, x: Value) -> Value:
    """Swap the time steps and channels of a sequence."""
    step.rank(x, 3)
    return step.emit(
        "transpose", x.name, 1, 2, shape=(x.shape[0], x.shape[2], x.shape[1])
    )  # (batch, c, time)


def matmul(step: Step, a: Value, b: Value) -> Value:
    """Multiply the matrices of two sequences: (batch, m, k) by (batch, k, n) is (batch, m, n)."""
    step.rank(a, 3)
    step.rank(b, 3)
    if a.shape[2] != b.shape[1]:
        step.refuse(f"{a.shape} and {b.shape} cannot be multiplied")
    return step.emit("matmul", a.name, b.name, shape=(a.shape[0], a.shape[1], b.shape[2]))
