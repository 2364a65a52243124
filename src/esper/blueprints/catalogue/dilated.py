"""A 3×3 window with holes: sees 5×5 pixels at the price of 3×3.

For sites whose window is too small for what they must see. It is centred on the site's window and refused
where it cannot be.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["dilated"]

dilated = Graph(
    name="dilated",
    summary="a 3×3 convolution with dilation 2, SiLU, and a 1×1 convolution out",
    source="Yu & Koltun 2015, arXiv:1511.07122",
    layouts=("image",),
    ports=("parallel", "serial"),
    nodes=(
        node("wide", "conv", "x", channels="hidden", kernel=3, dilation=2, geometry="window"),
        node("active", "silu", "wide"),
        node("out", "conv", "active", channels="outputs", kernel=1),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
