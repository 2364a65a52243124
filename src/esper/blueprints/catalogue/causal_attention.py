"""Self-attention that sees the past only: lets a language model's block read from other steps.

``hidden`` is the width of one head, so any number fits. The key has no bias: the same number added to all
scores of a step changes no softmax, so it would never receive a gradient.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["causal_attention"]

causal_attention = Graph(
    name="causal_attention",
    summary="two heads of self-attention over the past, behind a norm",
    source="Radford et al. 2019 (GPT-2) after Vaswani et al. 2017, arXiv:1706.03762; norm first: 2002.04745",
    layouts=("sequence",),
    ports=("parallel", "serial"),
    nodes=(
        node("norm", "layer_norm", "x"),
        node("query", "affine", "norm", outputs="hidden*2"),
        node("key", "affine", "norm", outputs="hidden*2", bias=False),
        node("value", "affine", "norm", outputs="hidden*2"),
        node("read", "attention", "query", "key", "value", heads=2, causal=True),
        node("out", "affine", "read", outputs="outputs"),
    ),
    output="out",
)
