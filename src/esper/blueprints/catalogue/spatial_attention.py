"""A convolution whose pixels are weighed by how much is going on around them.

The map of weights comes from the mean and the largest channel over a 7×7 window: 98 numbers.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["spatial_attention"]

spatial_attention = Graph(
    name="spatial_attention",
    summary="a convolution with the site's window, pixels gated by a 7×7 map",
    source="Woo et al. 2018 (CBAM, spatial part), arXiv:1807.06521",
    layouts=("image",),
    ports=("parallel", "serial"),
    nodes=(
        node("window", "conv", "x", channels="hidden", kernel=3, geometry="site"),
        node("active", "silu", "window"),
        node("mean", "mean", "active", over="channels"),
        node("most", "amax", "active", over="channels"),
        node("seen", "concat", "mean", "most"),
        node("logit", "conv", "seen", channels=1, kernel=7),
        node("gate", "sigmoid", "logit"),
        node("weighed", "mul", "active", "gate"),
        node("out", "conv", "weighed", channels="outputs", kernel=1),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
