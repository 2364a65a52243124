"""Scaled dot-product attention, written out: ``torch.func.vmap`` runs the fused one in a slow loop."""

from __future__ import annotations

from esper.blueprints.building import Step, Value


def attention(step: Step, query: Value, key: Value, value: Value) -> Value:
    """Mix the time steps of a sequence, head by head (Vaswani et al., 2017, arXiv:1706.03762).

    ``causal`` lets every step see itself and the past only; nothing depends on the number of steps.

    Args:
        step: Node that is lowered.
        query: Value (batch, time, c).
        key: Value (batch, time, c).
        value: Value (batch, time, d).

    Returns:
        Value (batch, time, d).

    Raises:
        BlueprintError: Shapes do not go together, or ``heads`` does not divide c and d.
    """
    for given in (query, key, value):
        step.rank(given, 3)
    step.same((query, key), "query and key must have one shape")
    if value.shape[:2] != query.shape[:2]:
        step.refuse(f"query and value must have the same time steps, not {query.shape} and {value.shape}")
    heads = step.dimension("heads")
    if query.channels % heads or value.channels % heads:
        step.refuse(f"heads {heads} must divide the widths {query.channels} and {value.channels}")
    batch, time = query.shape[0], query.shape[1]
    width, out = query.channels // heads, value.channels // heads
    q, v = _heads(step, query, heads, width), _heads(step, value, heads, out)
    k = _heads(step, key, heads, width)
    k = step.emit("transpose", k.name, 2, 3, shape=(batch, heads, width, time))
    scores = (batch, heads, time, time)
    q = step.emit("mul", q.name, width**-0.5, shape=q.shape)
    mixed = step.emit("matmul", q.name, k.name, shape=scores)
    if step.attributes["causal"]:
        ones = step.emit("ones_like", mixed.name, shape=scores)
        past = step.emit("tril", ones.name, shape=scores)
        mask = step.emit("log", past.name, shape=scores)  # 0 for the past, −inf for what comes later
        mixed = step.emit("add", mixed.name, mask.name, shape=scores)
    mixed = step.emit("softmax", mixed.name, -1, shape=scores)
    read = step.emit("matmul", mixed.name, v.name, shape=(batch, heads, time, out))
    read = step.emit("transpose", read.name, 1, 2, shape=(batch, time, heads, out))
    return step.emit("flatten", read.name, 2, 3, shape=(batch, time, value.channels))


def _heads(step: Step, x: Value, heads: int, width: int) -> Value:
    """(batch, time, heads·width) → (batch, heads, time, width)."""
    batch, time, _ = x.shape
    apart = step.emit("unflatten", x.name, 2, (heads, width), shape=(batch, time, heads, width))
    return step.emit("transpose", apart.name, 1, 2, shape=(batch, heads, time, width))
