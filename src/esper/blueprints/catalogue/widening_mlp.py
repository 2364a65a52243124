"""Two hidden layers, the second twice as wide: depth where one layer is not enough.

The first layer is the narrow one, so wide inputs stay cheap; the wide one is then fed by few numbers.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["widening_mlp"]

widening_mlp = Graph(
    name="widening_mlp",
    summary="two hidden layers, the second twice as wide as the first",
    source="narrow then wide as in Sandler et al. 2018 (MobileNetV2), arXiv:1801.04381",
    layouts=("vector", "sequence"),
    ports=("parallel", "serial"),
    nodes=(
        node("inner", "affine", "x", outputs="hidden"),
        node("first", "gelu", "inner"),
        node("wide", "affine", "first", outputs="hidden*2"),
        node("second", "gelu", "wide"),
        node("out", "affine", "second", outputs="outputs"),
    ),
    output="out",
)
