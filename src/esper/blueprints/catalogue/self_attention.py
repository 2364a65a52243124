"""Self-attention over all steps: lets a site read from anywhere in the sequence.

Never for hosts that predict the next step: it sees the future (``Graph.mixes`` says so); they have
``causal_attention``. ``hidden`` is the width of one head. The key has no bias: the same number added to all
scores of a step changes no softmax, so it would never receive a gradient.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["self_attention"]

self_attention = Graph(
    name="self_attention",
    summary="two heads of self-attention over all steps, behind a norm",
    source="Vaswani et al. 2017, arXiv:1706.03762; norm first: Xiong et al. 2020, arXiv:2002.04745",
    layouts=("sequence",),
    ports=("parallel", "serial"),
    nodes=(
        node("norm", "layer_norm", "x"),
        node("query", "affine", "norm", outputs="hidden*2"),
        node("key", "affine", "norm", outputs="hidden*2", bias=False),
        node("value", "affine", "norm", outputs="hidden*2"),
        node("read", "attention", "query", "key", "value", heads=2, causal=False),
        node("out", "affine", "read", outputs="outputs"),
    ),
    output="out",
    experimental=True,  # never beat widening at equal parameters: esper bench blueprints
)
