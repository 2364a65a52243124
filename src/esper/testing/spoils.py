"""Ways to spoil a graph, each with what the refusal must say; graphs are given as decoded JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from esper.blueprints.operators import Constant
from esper.contracts import Signature

LAST = "last"  # the last affine of drawn graphs

Culprit = tuple[str | None, str]  # the node the message must name, and a part of the message


class NodeText(TypedDict):
    """A node as decoded JSON."""

    name: str
    op: str
    inputs: list[str]
    attributes: dict[str, Constant]


class GraphText(TypedDict):
    """A graph as decoded JSON, as far as it is spoilt."""

    nodes: list[NodeText]
    output: str


Spoil = Callable[[GraphText, Signature], Culprit]


def _entry(data: GraphText, name: str) -> NodeText:
    return next(one for one in data["nodes"] if one["name"] == name)


def _append(data: GraphText, name: str, op: str, inputs: list[str], **attributes: Constant) -> str:
    data["nodes"].append({"name": name, "op": op, "inputs": inputs, "attributes": attributes})
    return name


def _before_last(data: GraphText, name: str, op: str, extra: int = 0, **attributes: Constant) -> str:
    """Put a node between the last affine and what it reads."""
    last = _entry(data, LAST)
    before = last["inputs"][0]
    last["inputs"] = [name]
    return _append(data, name, op, [before] * (1 + extra), **attributes)


def _unknown_operator(data: GraphText, place: Signature) -> Culprit:
    _entry(data, LAST)["op"] = "exec"
    return LAST, "no such operator"


def _unknown_attribute(data: GraphText, place: Signature) -> Culprit:
    _entry(data, LAST)["attributes"]["speed"] = 3
    return LAST, "has no attribute 'speed'"


def _no_width(data: GraphText, place: Signature) -> Culprit:
    attributes = _entry(data, LAST)["attributes"]
    attributes.pop("outputs", None)
    attributes.pop("channels", None)
    return LAST, "lacks"


def _bad_dimension(data: GraphText, place: Signature) -> Culprit:
    attributes = _entry(data, LAST)["attributes"]
    attributes["outputs" if "outputs" in attributes else "channels"] = "outputs**2"
    return LAST, "is not understood"


def _huge(data: GraphText, place: Signature) -> Culprit:
    attributes = _entry(data, LAST)["attributes"]
    attributes["outputs" if "outputs" in attributes else "channels"] = "outputs*60000*60000*60000"
    return LAST, "at most"


def _unknown_input(data: GraphText, place: Signature) -> Culprit:
    _entry(data, LAST)["inputs"] = ["elsewhere"]
    return LAST, "is no node"


def _arity(data: GraphText, place: Signature) -> Culprit:
    entry = _entry(data, LAST)
    entry["inputs"] = entry["inputs"] * 2
    return LAST, "it takes 1 inputs, not 2"


def _twice(data: GraphText, place: Signature) -> Culprit:
    data["nodes"].append(_entry(data, LAST))
    return LAST, "another node has this name"


def _cycle(data: GraphText, place: Signature) -> Culprit:
    _append(data, "round", "gelu", ["again"])
    _append(data, "again", "gelu", ["round"])
    _entry(data, LAST)["inputs"] = ["round"]
    return "round", "cycle"


def _dead(data: GraphText, place: Signature) -> Culprit:
    return _append(data, "unread", "gelu", ["x"]), "dead"


def _loud(data: GraphText, place: Signature) -> Culprit:
    data["output"] = _append(data, "loud", "gelu", [data["output"]])
    return "loud", "zero at birth"


def _read_elsewhere(data: GraphText, place: Signature) -> Culprit:
    data["output"] = _append(
        data, "twice", "scale", [_append(data, "joined", "add", [data["output"]] * 2)], by=2.0
    )
    return "joined", "zero at birth"


def _no_output(data: GraphText, place: Signature) -> Culprit:
    data["output"] = "elsewhere"
    return None, "is no node"


def _wrong_width(data: GraphText, place: Signature) -> Culprit:
    attributes = _entry(data, LAST)["attributes"]
    attributes["outputs" if "outputs" in attributes else "channels"] = "outputs*2"
    return data["output"], "where the site has"


def _wrong_rank(data: GraphText, place: Signature) -> Culprit:
    if place.layout == "image":
        return _before_last(data, "wrong", "layer_norm"), "not an image"
    return _before_last(data, "wrong", "group_norm"), "it takes an image"


def _clash(data: GraphText, place: Signature) -> Culprit:
    wide = _before_last(
        data, "wide", "concat", extra=3
    )  # 4·n against 2·n channels: unequal, and neither is 1
    part = _append(data, "part", "split", [wide], parts=2, index=0)
    _entry(data, LAST)["inputs"] = [_append(data, "clash", "add", [part, wide])]
    return "clash", "do not go together"


SPOILS: tuple[Spoil, ...] = (
    _unknown_operator,
    _unknown_attribute,
    _no_width,
    _bad_dimension,
    _huge,
    _unknown_input,
    _arity,
    _twice,
    _cycle,
    _dead,
    _loud,
    _read_elsewhere,
    _no_output,
    _wrong_width,
    _wrong_rank,
    _clash,
)
