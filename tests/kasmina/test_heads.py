"""Attention heads: found where a copy proves them, refused with the reason elsewhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.kasmina.widths.heads import HeadsPair
from esper.surgery.widen_layers import widen
from tests.kasmina.zoo import Net

WIDTH, HEADS = 8, 2
X = torch.randn(5, 6, WIDTH)


class Heads(nn.Module):
    """Self-attention with the many ways to write it as switches."""

    def __init__(self, style: str, bias: bool = True, inner: int = WIDTH) -> None:
        super().__init__()
        self.style, self.num_heads, self.head_dim, self.inner_dim = style, HEADS, inner // HEADS, inner
        few = self.head_dim if style == "grouped queries" else inner
        self.q, self.out = nn.Linear(WIDTH, inner, bias=bias), nn.Linear(inner, WIDTH, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, few, bias=bias) for _ in range(2))
        self.register_buffer("ahead", torch.ones(16, 16).triu(1).bool())
        self.slope = nn.Parameter(torch.randn(HEADS, 1, 1))
        self.drop = nn.Dropout(0.5)

    def split(self, x: Tensor) -> Tensor:
        size = (self.num_heads, self.head_dim) if self.style != "by size" else (-1, self.head_dim)
        return x.view(*x.shape[:2], *size).transpose(1, 2)

    def merge(self, y: Tensor, x: Tensor) -> Tensor:
        y = y.transpose(1, 2)
        if self.style == "width of the input":
            return y.reshape(*x.shape)
        return y.reshape(*x.shape[:2], self.inner_dim if self.style == "inner size" else -1)

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "grouped queries":
            q = self.split(self.q(x))
            k, v = (layer(x)[:, None].expand(-1, HEADS, -1, -1) for layer in (self.k, self.v))
        else:
            q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        if self.style == "rotary":
            turn = torch.arange(x.shape[1], device=x.device)[:, None].cos().to(x)
            q, k = (torch.cat([t[..., ::2] * turn, t[..., 1::2]], -1) for t in (q, k))
        if self.style in {"fast", "inner size", "by size"}:
            p = self.drop.p if self.training else 0.0
            return self.out(self.merge(F.scaled_dot_product_attention(q, k, v, dropout_p=p), x))
        scale = 1.0 if self.style == "unscaled" else self.head_dim**-0.5
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
        if self.style == "causal buffer":
            scores = scores.masked_fill(self.ahead[: x.shape[1], : x.shape[1]], float("-inf"))
        if self.style == "slopes":
            scores = scores + self.slope
        if self.style == "capped":
            scores = torch.tanh(scores)
        return self.out(self.merge(self.drop(scores.softmax(-1)) @ v, x))


FOUND = ["plain", "fast", "causal buffer", "unscaled", "inner size", "by size"]


@pytest.mark.parametrize("inner", [WIDTH, 12], ids=["square", "wider inside"])
@pytest.mark.parametrize("style", FOUND)
def test_new_heads_change_nothing_at_birth_and_widen_as_their_branch_computes(style: str, inner: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Heads(style, bias=inner == WIDTH, inner=inner).double())
    x = X.double()
    wrapped = esper.wrap(net, x).eval()
    assert list(wrapped.pairs) == ["0.q>0.out"]
    for _ in range(2):  # a second widening starts from the grown numbers
        pair = wrapped.pairs["0.q>0.out"]
        assert isinstance(pair, HeadsPair)
        assert pair.site.granularity == inner // HEADS
        assert pair.dropout == 0.5, "the training pass says how much is dropped"
        kernel = pair.kernel(2 * pair.site.granularity)
        with torch.no_grad():
            assert not kernel(x).any()
            kernel.consumer_weight.normal_()
            branch, parameters = net(x) + kernel(x), wrapped.parameter_count()
            plan = kernel.plan()
            widen(net, plan, kernel.slices(plan))
            wrapped.refresh(lambda: net(x))
            torch.testing.assert_close(net(x), branch, rtol=0, atol=1e-12)
        assert wrapped.parameter_count() == parameters + plan.units * pair.site.unit_parameters
    heads = net[0]
    assert isinstance(heads, Heads)
    assert heads.q.out_features == 3 * inner
    assert heads.num_heads == 3 * HEADS
    assert heads.inner_dim == (3 * inner if style == "inner size" else inner)
    net.train()(x).sum().backward()


class Torch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x, x, x)[0]


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.q(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


REFUSED: dict[str, tuple[nn.Module, str, str]] = {
    "width of the input": (
        Heads("width of the input"),
        "q",
        r"do not fit the forward pass.*num_heads.*shape",
    ),
    "rotary": (Heads("rotary"), "q", "stands in the attention before .*no rotary embeddings"),
    "grouped queries": (Heads("grouped queries"), "q", "do not fit the forward pass"),
    "slopes": (Heads("slopes"), "q", "slope is added to the scores"),
    "capped": (Heads("capped"), "q", "tanh stands in the attention"),
    "fused, a constant number of heads": (Fused(), "q", "do not fit the forward pass"),
    "torch's own": (Torch(), "out.out_proj", "nn.MultiheadAttention never calls it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_attention_is_refused_with_the_reason(case: str) -> None:
    module, place, reason = REFUSED[case]
    net = Net(
        lambda s, x: s.att(x) + s.two(torch.relu(s.one(x))),
        att=module, one=nn.Linear(WIDTH, 3), two=nn.Linear(3, WIDTH),
    )  # fmt: skip
    wrapped = esper.wrap(net, X, blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    assert re.search(reason, told[f"att.{place}"]), told[f"att.{place}"]


def test_a_mask_from_outside_is_refused() -> None:
    def body(s: Any, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (s.q(x), s.k(x), s.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return s.two(torch.relu(s.one(s.out(y.transpose(1, 2).flatten(2)))))

    layers = {name: nn.Linear(WIDTH, WIDTH) for name in ("q", "k", "v", "out", "one", "two")}
    wrapped = esper.wrap(Net(body, **layers), (X, torch.ones(6, 6, dtype=torch.bool)), blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    assert "gets a mask from outside" in told["q"]
    assert list(wrapped.pairs) == ["out>one", "one>two"]
