"""A product of two thin matrices: correlations a layer lacks, at the price of a few rows.

It is affine, so at the end of a run it can be merged into a linear layer and costs nothing.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["low_rank"]

low_rank = Graph(
    name="low_rank",
    summary="a linear map of rank hidden; can be merged into the layer it grew beside",
    source="Hu et al. 2021 (LoRA), arXiv:2106.09685",
    layouts=("vector", "sequence"),
    ports=("parallel", "serial"),
    nodes=(
        node("down", "affine", "x", outputs="hidden", bias=False),
        node("out", "affine", "down", outputs="outputs"),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
