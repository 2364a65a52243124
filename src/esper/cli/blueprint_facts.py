"""What ``esper blueprints`` says of a blueprint: where it is found, what it is, what it costs."""

from __future__ import annotations

import os
from typing import TypedDict

import torch

from esper.blueprints import CATALOGUE
from esper.blueprints.graph import Graph
from esper.blueprints.kernel import GraphKernel
from esper.blueprints.representative import HIDDEN, describe, representative
from esper.blueprints.sizes import example_shapes
from esper.kasmina.branches.choice import read_graph
from esper.kasmina.recording.flops import FlopMeter


class Row(TypedDict):
    """A blueprint in the list; its parameters are those at the first typical place it fits."""

    name: str
    layouts: list[str]
    ports: list[str]
    parameters: int | None
    place: str | None
    hidden: int  # units
    experimental: bool
    affine: bool
    mixes: object
    summary: str


class Cost(TypedDict):
    """What a blueprint costs at a place."""

    place: str
    hidden: int  # units
    parameters: int
    flops: int  # forward, one example
    input: list[int]  # shape


def find(name: str) -> Graph:
    """Return a blueprint by its name, or read it from a file.

    Raises:
        BlueprintError: The file cannot be read or is no valid blueprint.
        RegistryError: There is neither such a file nor such a name.
    """
    if not name.endswith(".json") and not os.path.isfile(name):
        return CATALOGUE.get(name)
    return read_graph(name)


def row(graph: Graph) -> Row:
    """Describe a blueprint in a line of the list."""
    places = representative(graph)
    program = graph.lower(places[0], HIDDEN) if places else None
    return {
        "name": graph.name,
        "layouts": list(graph.layouts),
        "ports": list(graph.ports),
        "parameters": program.parameter_count() if program else None,
        "place": describe(places[0]) if places else None,
        "hidden": HIDDEN,
        "experimental": graph.experimental,
        "affine": graph.affine,
        "mixes": graph.mixes,
        "summary": graph.summary,
    }


def costs(graph: Graph, hidden: int | None) -> list[Cost]:
    """Count what a blueprint costs at every typical place it fits.

    Args:
        graph: Blueprint whose cost is counted.
        hidden: Free width, in units; None: the usual one.
    """
    found: list[Cost] = []
    for place in representative(graph):
        program = graph.lower(place, hidden or HIDDEN)
        shape = (1, *example_shapes(place)[0][0][1:])
        with torch.no_grad(), FlopMeter() as meter:
            GraphKernel(program)(torch.zeros(shape))
        found.append(
            {
                "place": describe(place),
                "hidden": hidden or HIDDEN,
                "parameters": program.parameter_count(),
                "flops": meter.total,
                "input": list(shape),
            }
        )
    return found


def lines(graph: Graph) -> list[str]:
    """Write a blueprint's nodes as lines of a program."""
    written: list[str] = []
    for one in graph.structure.order:
        given = [*one.inputs, *(f"{name}={value}" for name, value in one.attributes)]
        end = "   # starts at zero" * (one.name == graph.structure.last)
        written.append(f"{one.name} = {one.op}({', '.join(given)}){end}")
    return [*written, f"return {graph.output}"]
