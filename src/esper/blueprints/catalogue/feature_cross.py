"""Products of learned features: second-order terms that sums and ReLUs only approximate.

For tables, where "price × region" matters and neither does alone. The plain part keeps the first order.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["feature_cross"]

feature_cross = Graph(
    name="feature_cross",
    summary="products of two linear maps of the input, beside one of them",
    source="Wang et al. 2020 (DCN V2, low-rank cross), arXiv:2008.13535",
    layouts=("vector",),
    ports=("parallel", "serial"),
    nodes=(
        node("left", "affine", "x", outputs="hidden"),
        node("right", "affine", "x", outputs="hidden"),
        node("cross", "mul", "left", "right"),
        node("both", "concat", "left", "cross"),
        node("out", "affine", "both", outputs="outputs"),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
