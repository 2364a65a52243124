"""Attention whose q, k and v come from one layer, and whose heads of q share heads of k and v."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.kasmina.widths.heads import HeadsPair
from esper.surgery.optimizers.averages import widen_average
from esper.surgery.optimizers.widening import widen_state
from esper.surgery.widen_layers import widen
from tests.kasmina.zoo import Net

WIDTH, HEADS, SIZE = 8, 2, 3
X = torch.randn(5, 6, WIDTH)


class One(nn.Module):
    """One layer makes q, k and v; the ways to cut it up as switches."""

    def __init__(self, style: str, bias: bool = True) -> None:
        super().__init__()
        self.style, self.num_heads, self.head_dim, self.attn_dim = style, HEADS, SIZE, HEADS * SIZE
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * SIZE, bias=bias)
        self.proj = nn.Linear(HEADS * SIZE, WIDTH, bias=bias)

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        batch, time, _ = x.shape
        if self.style == "timm":
            cut = self.qkv(x).reshape(batch, time, 3, self.num_heads, self.head_dim)
            return cut.permute(2, 0, 3, 1, 4).unbind(0)
        if self.style == "by head":
            cut = self.qkv(x).view(batch, time, self.num_heads, 3 * self.head_dim)
            return tuple(t.transpose(1, 2) for t in cut.chunk(3, -1))
        parts = (
            self.qkv(x).split(self.attn_dim, dim=2) if self.style == "nanoGPT" else self.qkv(x).chunk(3, -1)
        )
        q, k, v = (t.view(batch, time, self.num_heads, self.head_dim).transpose(1, 2) for t in parts)
        return (k, q, v) if self.style == "k q v" else (q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.cut(x)
        if self.style == "by hand":
            y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.style == "nanoGPT")
        return self.proj(y.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))


class Grouped(nn.Module):
    """Two heads of q for each of k and v."""

    def __init__(self, style: str, bias: bool = True) -> None:
        super().__init__()
        self.style, self.n_heads, self.n_kv_heads, self.n_rep, self.head_dim = style, 4, 2, 2, SIZE
        self.q, self.proj = nn.Linear(WIDTH, 4 * SIZE, bias=bias), nn.Linear(4 * SIZE, WIDTH, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, 2 * SIZE, bias=bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.q(x).view(batch, time, self.n_heads, self.head_dim).transpose(1, 2)
        k, v = (
            t(x).view(batch, time, self.n_kv_heads, self.head_dim).transpose(1, 2) for t in (self.k, self.v)
        )
        if self.style == "repeat_interleave":
            k, v = (t.repeat_interleave(self.n_rep, 1) for t in (k, v))
        if self.style == "expand":
            k, v = (
                t[:, :, None]
                .expand(batch, self.n_kv_heads, self.n_rep, time, SIZE)
                .reshape(batch, -1, time, SIZE)
                for t in (k, v)
            )
        if self.style == "tiled":  # head h of q reads head h % n_kv_heads: a new head would move the old ones
            k, v = (torch.cat([t] * self.n_rep, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.style == "enable_gqa")
        return self.proj(y.transpose(1, 2).reshape(batch, time, -1))


ONE = ["chunk", "nanoGPT", "timm", "by head", "k q v", "by hand"]
GROUPED = ["enable_gqa", "repeat_interleave", "expand"]
ALL: list[tuple[type[One | Grouped], str]] = [
    *((One, style) for style in ONE),
    *((Grouped, s) for s in GROUPED),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "style"), ALL)
def test_heads_grow_as_their_branch_computed(kind: type[One | Grouped], style: str, bias: bool) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(kind(style, bias)).double(), X.double()
    wrapped = esper.wrap(net, x).eval()
    (name,) = wrapped.pairs
    for number in (1, 2):
        pair = wrapped.pairs[name]
        assert isinstance(pair, HeadsPair)
        assert pair.site.granularity == SIZE
        kernel = pair.kernel(number * SIZE)
        with torch.no_grad():
            before, old = net(x), {n: p.clone() for n, p in net.named_parameters()}
            assert not kernel(x).any()
            kernel.consumer_weight.normal_()
            branch, parameters = before + kernel(x), wrapped.parameter_count()
            hidden = kernel(x, hidden=True)
            torch.testing.assert_close(kernel(x), hidden @ kernel.consumer_weight.T)
            plan = kernel.plan()
            widen(net, plan, kernel.slices(plan))
            wrapped.refresh(lambda: net(x))
            torch.testing.assert_close(net(x), branch, rtol=0, atol=1e-12)
        assert not torch.allclose(before, branch)
        assert wrapped.parameter_count() == parameters + plan.units * pair.site.unit_parameters
        now = dict(net.named_parameters())
        for edit in plan.edits:
            more = (edit.new - edit.old) // edit.chunks
            cut = now[edit.name].split([edit.old // edit.chunks, more] * edit.chunks, edit.axis)[::2]
            assert torch.equal(torch.cat(cut, edit.axis), old[edit.name])
    assert wrapped.pairs[name].site.width == (HEADS + 3) * SIZE
    net.train()(x).sum().backward()


@pytest.mark.parametrize(("kind", "style"), [(One, "timm"), (Grouped, "enable_gqa")])
def test_the_output_at_birth_optimizers_and_averages(kind: type[One | Grouped], style: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(kind(style), nn.Flatten(), nn.Linear(6 * WIDTH, 3))
    optimizer, average = torch.optim.Adam(net.parameters(), 0.01), torch.optim.swa_utils.AveragedModel(net)

    def train() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X), torch.arange(5) % 3)
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        return float(loss.detach())

    train()
    wrapped = esper.wrap(net, X)
    pair = next(iter(wrapped.pairs.values()))
    kernel = pair.kernel(SIZE)
    plan = kernel.plan()
    before, slices = net(X).detach(), kernel.slices(plan)
    widened = widen(net, plan, slices)
    assert widen_state({"adam": optimizer}, widened.changes) == []
    widen_average(average, plan, slices)
    assert float((net(X).detach() - before).abs().max()) <= 2e-6 * float(before.abs().max())
    losses = [train() for _ in range(20)]
    assert losses[-1] < losses[0]
    first = widened.changes[0]
    assert all(
        bool((state.abs().flatten(1).amax(1) > 0).all())
        for state in [optimizer.state[first.parameter]["exp_avg"]]
    )


def test_heads_of_q_that_take_turns_are_refused() -> None:
    def body(s: Any, x: Tensor) -> Tensor:
        return s.att(x) + s.two(torch.relu(s.one(x)))

    net = Net(body, att=Grouped("tiled"), one=nn.Linear(WIDTH, 3), two=nn.Linear(3, WIDTH))
    wrapped = esper.wrap(net, X, blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    assert re.search("cat stands in the attention", told["att.q"]), told["att.q"]
