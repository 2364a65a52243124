"""A norm, a narrow hidden layer, and back: the adapter that tunes a transformer beside its blocks.

The norm lets it start at the same scale wherever in the network it sits.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["bottleneck_adapter"]

bottleneck_adapter = Graph(
    name="bottleneck_adapter",
    summary="a norm, then a narrow hidden layer",
    source="Houlsby et al. 2019, arXiv:1902.00751",
    layouts=("sequence",),
    ports=("parallel", "serial"),
    nodes=(
        node("norm", "layer_norm", "x"),
        node("down", "affine", "norm", outputs="hidden"),
        node("active", "gelu", "down"),
        node("out", "affine", "active", outputs="outputs"),
    ),
    output="out",
)
