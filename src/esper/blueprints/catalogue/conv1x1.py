"""A small MLP at every pixel: mixes channels and looks at no neighbour.

The cheapest non-linear kernel for images. Beside a convolution it takes that one's stride; where no padding
centres a single pixel on the site's window it is refused.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["conv1x1"]

conv1x1 = Graph(
    name="conv1x1",
    summary="an MLP over the channels of every pixel",
    source="Lin et al. 2013 (Network In Network), arXiv:1312.4400",
    layouts=("image",),
    ports=("parallel", "serial"),
    nodes=(
        node("inner", "conv", "x", channels="hidden", kernel=1, geometry="window"),
        node("active", "silu", "inner"),
        node("out", "conv", "active", channels="outputs", kernel=1),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
