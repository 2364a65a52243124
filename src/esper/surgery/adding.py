"""A branch as torch.fx modules: what adds a program's output to a layer's, and what keeps what it reads.

They are called as hooks, read the weights from the module they are called for and are themselves stateless.
A ``GraphModule`` is pickled as its own code: a process unpickles, copies, compiles and exports a grown model
with torch alone. Code without choices is the price, so where in a call the tensors are is written down once.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn

from esper.blueprints.program import Argument, Program, function
from esper.errors import SurgeryError

Key: TypeAlias = "int | str"
Holder: TypeAlias = "tuple[str, Key]"  # how something that holds a tensor is renewed, and where it has it


@dataclass(frozen=True, slots=True)
class Passing:
    """Where a layer's first floating-point tensors are.

    Attributes:
        reads: Path to the input: a pair per level, "args" or "kwargs" first, then as for the output.
        writes: Path to the output: "tuple", "list", "dict", "field" of a named tuple or "item" of any other
            mapping, and the key.
    """

    reads: tuple[Holder, ...] = (("args", 0),)
    writes: tuple[Holder, ...] = ()


DIRECT = Passing()  # the first argument, and the output itself


def adding(
    program: Program, names: Mapping[str, str], passing: Passing, serial: bool, apart: bool
) -> fx.GraphModule:
    """Return a forward hook that adds a program's output to a module's.

    Args:
        program: Program to compute.
        names: Names under which the module has each weight.
        passing: Positions of input and output in a call.
        serial: True where it reads the module's output.
        apart: True where the input is that of another module, kept in a dict, which comes first then.
    """
    graph = fx.Graph()
    kept = graph.placeholder("kept") if apart else None
    module, args, kwargs, output = (graph.placeholder(n) for n in ("module", "args", "kwargs", "output"))
    y = found(graph, output, passing.writes)
    if serial:
        x = y
    elif kept is not None:
        x = graph.call_method("pop", (kept, "x"))
    else:
        x = read(graph, args, kwargs, passing.reads)
    values: dict[str, fx.Node] = {"%x": x}
    for weight in program.weights:
        values[f"@{weight.name}"] = graph.call_function(getattr, (module, names[weight.name]))
    for one in program.instructions:
        given = tuple(resolved(argument, values) for argument in one.arguments)
        values[f"%{one.result}"] = graph.call_function(function(one.function), given)
    like = graph.call_function(getattr, (y, "dtype"))
    part = graph.call_method("to", (values[program.result], like))
    graph.output(renewed(graph, output, passing.writes, graph.call_function(torch.add, (y, part))))
    return fx.GraphModule(nn.Module(), graph, class_name="Branch")


def keeping(passing: Passing) -> fx.GraphModule:
    """Return a forward pre-hook that puts a module's input into a dict, its first argument."""
    graph = fx.Graph()
    kept, _, args, kwargs = (graph.placeholder(name) for name in ("kept", "module", "args", "kwargs"))
    graph.call_method("update", (kept, {"x": read(graph, args, kwargs, passing.reads)}))
    graph.output(None)
    return fx.GraphModule(nn.Module(), graph, class_name="Kept")


def read(graph: fx.Graph, args: fx.Node, kwargs: fx.Node, path: tuple[Holder, ...]) -> fx.Node:
    """Return what lies at a path of a call's arguments."""
    return found(graph, args if path[0][0] == "args" else kwargs, path)


def found(graph: fx.Graph, holder: fx.Node, path: tuple[Holder, ...]) -> fx.Node:
    """Return what lies at a path below."""
    for kind, key in path:
        holder = graph.call_function(getattr if kind == "field" else operator.getitem, (holder, key))
    return holder


def renewed(graph: fx.Graph, holder: fx.Node, path: tuple[Holder, ...], new: fx.Node) -> fx.Node:
    """Return what holds a tensor with another one in its place."""
    if not path:
        return new
    (kind, key), *rest = path
    inner = renewed(graph, found(graph, holder, path[:1]), tuple(rest), new) if rest else new
    if kind in ("tuple", "list"):
        assert isinstance(key, int)
        one = (inner,) if kind == "tuple" else [inner]
        before = graph.call_function(operator.getitem, (holder, slice(None, key)))
        behind = graph.call_function(operator.getitem, (holder, slice(key + 1, None)))
        begun = graph.call_function(operator.add, (before, one))
        return graph.call_function(operator.add, (begun, behind))
    if kind == "field":
        return graph.call_method("_replace", (holder,), {str(key): inner})
    if kind == "dict":
        renewal: Any = {key: inner}
        return graph.call_function(operator.or_, (holder, renewal))
    graph.call_method("__setitem__", (holder, key, inner))  # it was made for this call
    return holder


def resolved(argument: Argument, values: Mapping[str, fx.Node]) -> fx.node.Argument:
    """Return what an instruction's argument stands for."""
    if isinstance(argument, tuple) and argument and isinstance(argument[0], str):
        return [values[str(name)] for name in argument]
    return values[argument] if isinstance(argument, str) and argument[:1] in "%@" else argument


def passing_of(
    args: tuple[object, ...], kwargs: Mapping[str, object], output: object, serial: bool
) -> Passing:
    """Write down where the tensors of a call are.

    Raises:
        SurgeryError: The output is of a kind that no plain code could renew.
    """
    reads: tuple[Holder, ...] = DIRECT.reads
    for name, path in () if serial else (("args", where(args)), ("kwargs", where(kwargs))):
        if path:
            reads = ((name, path[0][1]), *path[1:])
            break
    writes = where(output)
    if writes is None:
        raise SurgeryError(f"its output, a {type(output).__name__}, is no nest of tuples and mappings")
    return Passing(reads, writes)


def where(tree: object) -> tuple[Holder, ...] | None:
    """Return the way to the first floating-point tensor of a nest, None where there is none."""
    if isinstance(tree, Tensor):
        return () if tree.is_floating_point() else None
    for kind, key, below in inside(tree):
        rest = where(below)
        if rest is not None:
            return ((kind, key), *rest)
    return None


def inside(tree: object) -> list[tuple[str, Key, object]]:
    """List what a tuple, list or mapping holds, and how it is renewed."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return [("field", name, getattr(tree, name)) for name in tree._fields]
    if isinstance(tree, (tuple, list)) and type(tree) in (tuple, list):
        return [(type(tree).__name__, index, one) for index, one in enumerate(tree)]
    if isinstance(tree, Mapping):
        kind = "dict" if type(tree) in (dict, OrderedDict) else "item"
        return [(kind, key, one) for key, one in tree.items() if isinstance(key, int | str)]
    return []
