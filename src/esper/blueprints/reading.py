"""Reading a graph from text nobody vouches for: sizes first, then types, then the graph itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar

from esper.blueprints.building import Constant
from esper.blueprints.structure import MAX_NODES, NAME
from esper.errors import BlueprintError, nearest

if TYPE_CHECKING:
    from esper.blueprints.graph import Layout, Port

MAX_TEXT = 1 << 18  # characters; the largest valid graph needs less
MAX_WORDS = 600  # characters of a summary or source
LAYOUTS = ("vector", "sequence", "image")
PORTS = ("parallel", "serial")
FIELDS = ("name", "summary", "source", "layouts", "ports", "nodes", "output")
NODE_FIELDS = ("name", "op", "inputs", "attributes")
Typed = TypeVar("Typed")


class NodeFields(TypedDict):
    """A node's fields."""

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, Constant]


class GraphFields(TypedDict):
    """A graph's fields, each of its type; whether a layout or port is known, the graph checks."""

    name: str
    summary: str
    source: str
    layouts: tuple[Layout, ...]
    ports: tuple[Port, ...]
    nodes: list[NodeFields]
    output: str
    experimental: bool


def read(text: str) -> GraphFields:
    """Return a graph's fields with the types they must have; their meaning is checked by the graph.

    Raises:
        BlueprintError: The text is too large, not JSON, or not a graph.
    """
    if len(text) > MAX_TEXT:
        _refuse(f"it has {len(text)} characters; at most {MAX_TEXT} are allowed")
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BlueprintError):
            raise
        raise BlueprintError(f"this is no blueprint: not JSON ({str(error)[:120]})") from None
    _fields(data, FIELDS, ("experimental",), "the graph")
    for name in ("name", "summary", "source", "output"):
        _typed(data[name], str, f"{name} must be text")
    _typed(data.setdefault("experimental", False), bool, "experimental must be true or false")
    for name in ("layouts", "ports"):
        data[name] = _texts(data[name], f"{name} must be a list of texts")
    nodes = data["nodes"]
    _typed(nodes, list, "nodes must be a list")
    if not 1 <= len(nodes) <= MAX_NODES:
        _refuse(f"it has {len(nodes)} nodes; 1…{MAX_NODES} are allowed")
    for number, one in enumerate(nodes):
        _node(one, number)
    return data


def check_header(
    name: str, summary: str, source: str, layouts: tuple[str, ...], ports: tuple[str, ...]
) -> None:
    """Refuse a graph whose name, words, layouts or ports are not what they must be.

    Args:
        name: Lower case, at most 48 characters.
        summary: Line of at most 600 characters.
        source: Paper or place it is from, at most 600 characters.
        layouts: Layouts it fits, each once.
        ports: Ports it fits, each once.

    Raises:
        BlueprintError: With the field.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        _refuse(f"the name {str(name)[:60]!r} must be lower case and at most 48 characters")
    for field, words in (("summary", summary), ("source", source)):
        if not words or len(words) > MAX_WORDS:
            _refuse(f"graph {name!r}: {field} must have 1…{MAX_WORDS} characters")
    for field, chosen, known in (("layouts", layouts, LAYOUTS), ("ports", ports, PORTS)):
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
            _refuse(f"graph {name!r}: {field} must name some of {', '.join(known)}, each once")


def _node(given: object, number: int) -> None:
    one = _fields(given, NODE_FIELDS[:2], NODE_FIELDS[2:], f"node {number}")
    for name in ("name", "op"):
        _typed(one[name], str, f"node {number}: {name} must be text")
    one["inputs"] = _texts(
        one.setdefault("inputs", []), f"node {one['name'][:60]!r}: inputs must be a list of names"
    )
    attributes = one.setdefault("attributes", {})
    _typed(attributes, dict, f"node {one['name'][:60]!r}: attributes must be an object")
    if clash := {"name", "op"} & attributes.keys():
        _refuse(f"node {one['name'][:60]!r}: it has no attribute {', '.join(sorted(clash))}")
    for name, value in attributes.items():
        if not isinstance(value, str | int | float | bool):
            _refuse(f"node {one['name'][:60]!r}: {name[:60]} must be a text, a number, true or false")


def _fields(given: object, needed: tuple[str, ...], optional: tuple[str, ...], what: str) -> dict[str, Any]:
    data = _typed(given, dict, f"{what} must be an object")
    if missing := [name for name in needed if name not in data]:
        _refuse(f"{what} lacks {', '.join(missing)}")
    known = (*needed, *optional)
    if extra := [name for name in data if name not in known]:
        _refuse(f"{what} has a field {extra[0][:60]!r}; {nearest(extra[0][:60], known)}")
    return data


def _texts(given: object, problem: str) -> tuple[str, ...]:
    value = _typed(given, list, problem)
    if not all(isinstance(one, str) for one in value):
        _refuse(problem)
    return tuple(value)


def _typed(value: object, kind: type[Typed], problem: str) -> Typed:
    return value if isinstance(value, kind) else _refuse(problem)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse an object that says one thing twice: readers would not agree on which counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        _refuse("a name stands twice in one object")
    return found


def _constant(text: str) -> NoReturn:
    _refuse(f"{text} is no JSON number")


def _refuse(reason: str) -> NoReturn:
    raise BlueprintError(f"this is no blueprint: {reason}")
