"""What makes nodes a graph: known operators, no cycle, nothing dead, and an end that is zero at birth."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NoReturn

from esper.blueprints.building import Constant
from esper.blueprints.operators import OPERATORS
from esper.errors import BlueprintError, nearest
from esper.printable import quoted

INPUT = "x"
MAX_NODES = 256
NAME = re.compile(r"[a-z][a-z0-9_]{0,47}")


@dataclass(frozen=True, slots=True)
class Node:
    """One operator applied to earlier values; ``node`` writes it more briefly."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: tuple[tuple[str, Constant], ...] = ()  # sorted by name


def node(name: str, op: str, *inputs: str, **attributes: Constant) -> Node:
    """Return a node: ``node("up", "affine", "x", outputs="hidden*2")``."""
    return Node(name, op, inputs, tuple(sorted(attributes.items())))


@dataclass(frozen=True, slots=True)
class Structure:
    """What examination found out.

    Attributes:
        order: The nodes so that inputs come first: by depth first from the output, so that it follows from
            the wiring alone and not from how the nodes are listed.
        last: The affine node whose weights start at zero.
        mixes: Other positions of a sequence that the output depends on.
    """

    order: tuple[Node, ...]
    last: str
    mixes: Literal["none", "past", "all"]


def complete(one: Node) -> dict[str, Constant]:
    """Return a node's attributes, defaults included, numbers in one form."""
    given = dict(one.attributes)
    found: dict[str, Constant] = {}
    for name, attribute in sorted(OPERATORS[one.op].attributes.items()):
        value = given.get(name, attribute.default)
        assert value is not None
        found[name] = float(value) if attribute.kind == "number" else value
    return found


def examine(graph: str, nodes: tuple[Node, ...], output: str) -> Structure:
    """Check the nodes and their wiring.

    Raises:
        BlueprintError: The message names the node and the reason.
    """
    if not isinstance(nodes, tuple) or not 1 <= len(nodes) <= MAX_NODES:
        size = len(nodes) if isinstance(nodes, tuple) else "unknown"
        raise BlueprintError(f"graph {str(graph)[:60]!r} has {size} nodes; 1…{MAX_NODES} are allowed")
    known: dict[str, Node] = {}
    for one in nodes:
        if reason := _fault(one):
            _refuse(graph, one, reason)
        if one.name in known:
            _refuse(graph, one, "another node has this name")
        known[one.name] = one
    for one in nodes:
        for name in one.inputs:
            if name != INPUT and name not in known:
                _refuse(graph, one, f"its input {quoted(name)} is no node; {nearest(name, [INPUT, *known])}")
    if output not in known:
        raise BlueprintError(
            f"graph {graph!r}: the output {quoted(output)} is no node; {nearest(output, known)}"
        )
    order = _sorted(graph, known, output)
    reached = {one.name for one in order}
    for one in nodes:
        if one.name not in reached:
            _refuse(graph, one, "it is dead: nothing that reaches the output reads it")
    if not any(INPUT in one.inputs for one in order):
        _refuse(graph, known[output], f"the output does not depend on the input {INPUT!r}")
    return Structure(order, _last(graph, known, output), _mixing(order))


def _refuse(graph: str, one: Node, reason: str) -> NoReturn:
    raise BlueprintError(f"graph {graph!r}, node {str(one.name)[:60]!r} ({str(one.op)[:60]}): {reason}")


def _fault(one: Node) -> str | None:
    """Say what is wrong with a node by itself."""
    if not isinstance(one.name, str) or not NAME.fullmatch(one.name) or one.name == INPUT:
        return f"a node's name is lower case, at most 48 characters, and not {INPUT!r}"
    operator = OPERATORS.get(one.op) if isinstance(one.op, str) else None
    if operator is None:
        return f"no such operator; {nearest(str(one.op)[:60], OPERATORS)}"
    least, most = operator.inputs
    if not least <= len(one.inputs) <= most:
        wanted = str(least) if least == most else f"{least} to {most}"
        return f"it takes {wanted} inputs, not {len(one.inputs)}"
    if not all(isinstance(name, str) and len(name) <= 48 for name in one.inputs):
        return "its inputs must be names of nodes"
    given = dict(one.attributes)
    for name, value in given.items():
        if name not in operator.attributes:
            return f"it has no attribute {str(name)[:60]!r}; {nearest(str(name)[:60], operator.attributes)}"
        if reason := operator.attributes[name].fault(value):
            return f"{name}: {reason}"
    missing = [name for name, a in operator.attributes.items() if a.default is None and name not in given]
    return f"it lacks {', '.join(missing)}" if missing else None


def _sorted(graph: str, known: dict[str, Node], output: str) -> tuple[Node, ...]:
    """Return what the output needs, inputs first, without recursion."""
    order: list[Node] = []
    state: dict[str, Literal["open", "done"]] = {INPUT: "done"}
    stack = [output]
    while stack:
        name = stack[-1]
        if state.get(name) is None:
            state[name] = "open"
            for before in reversed(known[name].inputs):
                if state.get(before) == "open":
                    _refuse(graph, known[before], "it is part of a cycle")
                if before not in state:
                    stack.append(before)
        else:
            stack.pop()
            if state[name] == "open":
                state[name] = "done"
                order.append(known[name])
    return tuple(order)


def _last(graph: str, known: dict[str, Node], output: str) -> str:
    """Return the affine node that ends the graph, or refuse an output that may not be zero at birth.

    Nothing else reads what is passed on the way: it would be dead, or part of a cycle.
    """
    name = output
    while True:
        one = known[name]
        role = OPERATORS[one.op].role
        if role == "last":
            return name
        if role == "inner" or one.inputs[0] == INPUT:
            _refuse(
                graph,
                one,
                "the output would not be zero at birth; after the last affine or conv only "
                f"{' and '.join(n for n, o in OPERATORS.items() if o.role == 'linear')} may follow",
            )
        name = one.inputs[0]


def _mixing(order: tuple[Node, ...]) -> Literal["none", "past", "all"]:
    kinds = set()
    for one in order:
        attributes = complete(one)
        if attributes.get("causal"):
            kinds.add("past")
        elif attributes.get("over") == "positions":
            kinds.add("all")
        else:
            kinds.add(OPERATORS[one.op].mixes)
    return "all" if "all" in kinds else "past" if "past" in kinds else "none"
