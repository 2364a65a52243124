"""Squeeze the channels, convolve the few, open up again: a window at a price for wide sites.

Norms need no batch statistics, so the kernel behaves the same in training and evaluation.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["bottleneck"]

bottleneck = Graph(
    name="bottleneck",
    summary="1×1 down, the site's window over few channels, 1×1 up",
    source="He et al. 2015 (ResNet), arXiv:1512.03385; GroupNorm: Wu & He 2018, arXiv:1803.08494",
    layouts=("image",),
    ports=("parallel", "serial"),
    nodes=(
        node("down", "conv", "x", channels="hidden", kernel=1),
        node("norm", "group_norm", "down"),
        node("first", "silu", "norm"),
        node("window", "conv", "first", channels="hidden", kernel=3, geometry="site"),
        node("second", "silu", "window"),
        node("out", "conv", "second", channels="outputs", kernel=1),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
