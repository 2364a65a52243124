"""The feed-forward block of today's language models, small.

At equal parameters the gated forms reached a lower perplexity than ReLU and GELU in its paper.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["swiglu_mlp"]

swiglu_mlp = Graph(
    name="swiglu_mlp",
    summary="a norm, then SiLU of one map times another",
    source="Shazeer 2020, arXiv:2002.05202",
    layouts=("sequence",),
    ports=("parallel", "serial"),
    nodes=(
        node("norm", "layer_norm", "x"),
        node("logit", "affine", "norm", outputs="hidden"),
        node("gate", "silu", "logit"),
        node("value", "affine", "norm", outputs="hidden"),
        node("passed", "mul", "value", "gate"),
        node("out", "affine", "passed", outputs="outputs"),
    ),
    output="out",
)
