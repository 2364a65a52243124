"""A gate, then a norm: the hidden features keep one scale however the gate opens.

Where gates differ much between steps, an un-normalised product lets a few steps dominate the gradient.
"""

from __future__ import annotations

from esper.blueprints.graph import Graph, node

__all__ = ["gated_norm"]

gated_norm = Graph(
    name="gated_norm",
    summary="a gated hidden layer, normalised after the gate",
    source="Dao & Gu 2024 (Mamba-2's gated norm), arXiv:2405.21060",
    layouts=("sequence",),
    ports=("parallel", "serial"),
    nodes=(
        node("value", "affine", "x", outputs="hidden"),
        node("logit", "affine", "x", outputs="hidden"),
        node("gate", "silu", "logit"),
        node("passed", "mul", "value", "gate"),
        node("norm", "layer_norm", "passed"),
        node("out", "affine", "norm", outputs="outputs"),
    ),
    output="out",
)
