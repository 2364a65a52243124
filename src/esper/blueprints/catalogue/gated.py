"""A gated linear unit: one half decides how much of the other half passes.

Products of two maps of the input express "only if" with few units, where a plain MLP needs many.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["gated"]

gated = Graph(
    name="gated",
    summary="one map of the input, gated by the sigmoid of another",
    source="Dauphin et al. 2016 (GLU), arXiv:1612.08083",
    layouts=("vector",),
    ports=("parallel", "serial"),
    nodes=(
        node("value", "affine", "x", outputs="hidden"),
        node("logit", "affine", "x", outputs="hidden"),
        node("gate", "sigmoid", "logit"),
        node("passed", "mul", "value", "gate"),
        node("out", "affine", "passed", outputs="outputs"),
    ),
    output="out",
)
