"""One hidden layer beside what is there: the simplest kernel that adds a non-linear function.

A residual branch with a zero last layer (ReZero's lesson without its extra gate: Zhang et al., "Fixup
Initialization", 2019, arXiv:1901.09321) leaves the host alone at birth and learns from the first step.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["residual_mlp"]

residual_mlp = Graph(
    name="residual_mlp",
    summary="one hidden layer with GELU: the plain way to add a non-linear function",
    source="He et al. 2016, arXiv:1603.05027; zero last layer as in Zhang et al. 2019, arXiv:1901.09321",
    layouts=("vector", "sequence"),
    ports=("parallel", "serial"),
    nodes=(
        node("inner", "affine", "x", outputs="hidden"),
        node("active", "gelu", "inner"),
        node("out", "affine", "active", outputs="outputs"),
    ),
    output="out",
)
