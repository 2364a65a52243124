"""A convolution whose channels are weighed by what the whole image contains.

The mean over all pixels is the one thing a window cannot see.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["squeeze_excite"]

squeeze_excite = Graph(
    name="squeeze_excite",
    summary="a convolution with the site's window, channels gated by the image's mean",
    source="Hu et al. 2017 (SENet), arXiv:1709.01507",
    layouts=("image",),
    ports=("parallel", "serial"),
    nodes=(
        node("window", "conv", "x", channels="hidden", kernel=3, geometry="site"),
        node("active", "silu", "window"),
        node("mean", "mean", "active", over="positions"),
        node("squeeze", "conv", "mean", channels="hidden//2", kernel=1),
        node("few", "silu", "squeeze"),
        node("excite", "conv", "few", channels="hidden", kernel=1),
        node("gate", "sigmoid", "excite"),
        node("weighed", "mul", "active", "gate"),
        node("out", "conv", "weighed", channels="outputs", kernel=1),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
