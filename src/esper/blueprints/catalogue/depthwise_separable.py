"""One filter per channel, then a mix of channels: a window's reach at a fraction of its price.

A 3×3 window costs 9 numbers per channel instead of 9·c. The first convolution has the site's geometry, not
its groups: what it adds beside a grouped site is just the mixing that one lacks.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["depthwise_separable"]

depthwise_separable = Graph(
    name="depthwise_separable",
    summary="a filter per channel with the site's window, then an MLP over the channels",
    source="Howard et al. 2017 (MobileNets), arXiv:1704.04861",
    layouts=("image",),
    ports=("parallel", "serial"),
    nodes=(
        node("each", "conv", "x", channels="inputs", groups="inputs", kernel=3, geometry="site"),
        node("mixed", "conv", "each", channels="hidden", kernel=1),
        node("active", "silu", "mixed"),
        node("out", "conv", "active", channels="outputs", kernel=1),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
