"""Small graphs the tests of this room share."""

from typing import Any

from esper.blueprints.graph import Graph, Layout, Node
from esper.contracts import Signature

VECTOR = Signature("vector", "parallel", 6, 4)
SEQUENCE = Signature("sequence", "parallel", 6, 4)
IMAGE = Signature("image", "parallel", 6, 4)
STRIDED = Signature("image", "parallel", 6, 4, (3, 3), (2, 2), (1, 1), (1, 1))


def graph(*nodes: Node, output: str = "out", **header: Any) -> Graph:
    """A graph for every layout and port."""
    layouts: tuple[Layout, ...] = ("vector", "sequence", "image")
    given: dict[str, Any] = {"layouts": layouts, "ports": ("parallel", "serial"), **header}
    return Graph(name="tried", summary="tried", source="here", nodes=nodes, output=output, **given)
