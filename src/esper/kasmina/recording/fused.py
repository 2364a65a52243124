"""FLOPs of operators that run a whole layer in one call: torch has no formula for them and counts none.

Each equals what the plain operators of the same layer would count: 2 per multiply-add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch._ops import OpOverloadPacket

aten = torch.ops.aten


def positions(x: Tensor) -> int:
    """Count the vectors in a tensor of (…, channels), nested or packed too."""
    return x.numel() // max(int(x.size(-1)), 1)


def layer(x: Tensor, one: Tensor, two: Tensor, *rest: object, **options: object) -> int:
    """One recurrent layer in one direction: x (time, batch, in), weights (gates * hidden, in or hidden)."""
    return 2 * positions(x) * (one.numel() + two.numel())


def layer_backward(x: Tensor, one: Tensor, two: Tensor, *rest: object, **options: object) -> int:
    """Every product once for its input and once for its weight."""
    return 2 * layer(x, one, two)


def stack(x: Tensor, weights: list[Tensor], *rest: object, **options: object) -> int:
    """All layers and directions at once, as cuDNN runs them; projections are matrices too."""
    return 2 * positions(x) * sum(weight.numel() for weight in weights if weight.dim() == 2)


def stack_backward(x: Tensor, weights: list[Tensor], *rest: object, **options: object) -> int:
    """Every product once for its input and once for its weight."""
    return 2 * stack(x, weights)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    width: int,
    heads: int,
    inward: Tensor,
    inward_bias: Tensor,
    outward: Tensor,
    *rest: object,
    **options: object,
) -> int:
    """Projections and two products; inward makes q, k and v, (3 * width, width)."""
    projected = inward.numel() // 3 * (positions(q) + 2 * positions(k)) + outward.numel() * positions(q)
    return 2 * (projected + 2 * width * pairs(q, k))


def pairs(q: Tensor, k: Tensor) -> int:
    """Count the scores of one head: each position with each of its own example's."""
    if q.is_nested:
        return sum(int(a) * int(b) for a, b in zip(lengths(q), lengths(k), strict=True))
    return positions(q) * int(k.size(1))


def lengths(x: Tensor) -> list[int]:
    """List the lengths of the examples in a nested tensor."""
    return [int(size) for size in x._nested_tensor_size()[:, 0]]


def encoder(
    x: Tensor,
    width: int,
    heads: int,
    inward: Tensor,
    inward_bias: Tensor,
    outward: Tensor,
    outward_bias: Tensor,
    *rest: object,
    **options: object,
) -> int:
    """Attention of x with itself, and the two layers behind it: ffn_weight_1 and ffn_weight_2."""
    behind = sum(weight.numel() for weight in (rest[7], rest[9]) if isinstance(weight, Tensor))
    attended = attention(x, x, x, width, heads, inward, inward_bias, outward, outward_bias)
    return attended + 2 * positions(x) * behind


FORMULAS: Mapping[OpOverloadPacket, Callable[..., int]] = {
    aten.mkldnn_rnn_layer: layer,
    aten.mkldnn_rnn_layer_backward: layer_backward,
    aten._cudnn_rnn: stack,
    aten._cudnn_rnn_backward: stack_backward,
    aten._native_multi_head_attention: attention,
    aten._transformer_encoder_layer_fwd: encoder,
}
