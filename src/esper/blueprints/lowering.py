"""From a graph to a program: built on several example sizes, which must agree on everything but sizes."""

from __future__ import annotations

from esper.blueprints.building import Building, Step, Value
from esper.blueprints.operators import OPERATORS
from esper.blueprints.program import Program
from esper.blueprints.sizes import example_shapes
from esper.blueprints.structure import INPUT, Structure, complete
from esper.contracts import Signature
from esper.errors import BlueprintError


def lower(graph: str, structure: Structure, output: str, signature: Signature, hidden: int) -> Program:
    """Build a graph for one signature.

    Args:
        graph: Name of the graph, for messages.
        structure: Nodes in order, and which is the last affine.
        output: Name of the node whose value is added to the site's output.
        signature: Tensors it must fit.
        hidden: Free width, in units.

    Raises:
        BlueprintError: The message names the node and the reason.
    """
    shapes = example_shapes(signature)
    built = [_build(graph, structure, output, signature, hidden, given) for given, _ in shapes]
    first, value = built[0]
    for other, _ in built[1:]:
        _compare(graph, first, other)
    for (given, expected), (_, made) in zip(shapes, built, strict=True):
        if made.shape != expected:
            raise BlueprintError(
                f"graph {graph!r}, node {output!r}: it gives {made.shape} for an input of {given}, "
                f"where the site has {expected}"
            )
    return Program(
        signature, tuple(first.weights), tuple(first.instructions), value.name, tuple(first.outgoing)
    )


def _build(
    graph: str,
    structure: Structure,
    output: str,
    signature: Signature,
    hidden: int,
    given: tuple[int, ...],
) -> tuple[Building, Value]:
    building = Building(graph, signature, hidden)
    values = {INPUT: Value("%x", given)}
    for one in structure.order:
        step = Step(building, one.name, one.op, complete(one), one.name == structure.last)
        values[one.name] = OPERATORS[one.op].build(step, *(values[name] for name in one.inputs))
    return building, values[output]


def _compare(graph: str, first: Building, other: Building) -> None:
    """Refuse weights or instructions that depend on the number of positions."""
    for owner, a, b in zip(first.owners, first.weights, other.weights, strict=True):
        if a != b:
            raise BlueprintError(
                f"graph {graph!r}, node {owner!r}: the weight {a.name} would be {a.shape} or {b.shape}, "
                "depending on the number of positions"
            )
    for a, b in zip(first.instructions, other.instructions, strict=True):
        if a != b:
            raise BlueprintError(
                f"graph {graph!r}, node {a.node!r}: it would depend on the number of positions"
            )
