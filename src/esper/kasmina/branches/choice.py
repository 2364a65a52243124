"""What may grow: from the names a user gives to blueprints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from esper.blueprints import CATALOGUE
from esper.blueprints.graph import Graph
from esper.blueprints.reading import MAX_TEXT
from esper.errors import BlueprintError
from esper.files import read_regular


def chosen(names: Sequence[str]) -> list[Graph]:
    """Return the blueprints to offer.

    Args:
        names: "widen", "deepen", names of the catalogue, or paths of JSON files. "auto" is widening and, for
            a model in which nothing can be widened, every blueprint that has won its benchmark.

    Raises:
        RegistryError: No such blueprint.
        BlueprintError: A file does not hold a valid graph.
    """
    graphs: list[Graph] = []
    for name in names:
        if name == "auto":
            graphs += [g for g in map(CATALOGUE.get, CATALOGUE.names()) if not g.experimental]
        elif name.endswith(".json"):
            graphs.append(read_graph(name))
        elif name not in {"widen", "deepen"}:
            graphs.append(CATALOGUE.get(name))
    return graphs


def read_graph(path: str | Path) -> Graph:
    """Read a blueprint of the user's own.

    Raises:
        BlueprintError: The file cannot be read or is not a valid graph.
    """
    content = read_regular(path, limit=4 * MAX_TEXT, what="the blueprint", error=BlueprintError)
    try:
        return Graph.from_json(content.decode())
    except UnicodeDecodeError as error:
        raise BlueprintError(f"cannot read the blueprint {path}: {error}") from None
