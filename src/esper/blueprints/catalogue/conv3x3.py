"""The site's own window once more, with a non-linearity: what most convolutions are widened by in practice.

Beside a convolution it takes that one's kernel size, stride, padding, dilation, groups and padding mode, so
it sees exactly what the site sees; elsewhere it is 3×3. ``hidden`` counts channels per group.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["conv3x3"]

conv3x3 = Graph(
    name="conv3x3",
    summary="a convolution with the site's own window, SiLU, and a 1×1 convolution out",
    source="Simonyan & Zisserman 2014, arXiv:1409.1556; the 1×1 of Lin et al. 2013, arXiv:1312.4400",
    layouts=("image",),
    ports=("parallel", "serial"),
    nodes=(
        node("window", "conv", "x", channels="hidden*groups", groups="groups", kernel=3, geometry="site"),
        node("active", "silu", "window"),
        node("out", "conv", "active", channels="outputs", groups="groups", kernel=1),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
