"""Gates and last layers that begin at zero or next to it: what stands before them is proven, and grows.

ReZero, LayerScale, LoRA and residuals whose last layer or norm starts at zero let nothing through at first:
neither a fault of a place nor a gradient shows there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from tests.cases.loops import run

X = torch.randn(24, 10, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """x + gate · b(f(a(x))), and a head."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor], gate: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(10, 4), nn.Linear(4, 10), nn.Linear(10, 10)
        self.gate, self.between = nn.Parameter(gate), between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.gate * self.b(self.between(self, self.a(x))))


class Steeper(torch.autograd.Function):
    """Hands on another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * gradient


GATES = {"rezero": torch.zeros(1), "layer scale": torch.full((10,), 1e-6)}
FAULTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "dropout that is always on": (lambda s, h: F.dropout(torch.relu(h), 0.5), "dropout draws in evaluation"),
    "a number read from a width": (lambda s, h: torch.relu(h) / s.a.out_features, "a number may be read"),
    "a backward of its own": (lambda s, h: Steeper.apply(torch.relu(h)), "a backward of its own"),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_closed_gate_hides_no_fault(fault: str, gate: str) -> None:
    between, reason = FAULTS[fault]
    with pytest.raises(esper.SiteError, match=reason):
        esper.wrap(Residual(between, GATES[gate].clone()), X, blueprints=["widen"])


def zero_layer() -> nn.Module:
    net = Residual(lambda s, h: torch.relu(h), torch.ones(1))
    nn.init.zeros_(net.b.weight)
    nn.init.zeros_(net.b.bias)
    return net


def zero_norm() -> nn.Module:
    net = Residual(lambda s, h: torch.relu(h), torch.ones(1))
    net.b = nn.Sequential(nn.Linear(4, 10), nn.BatchNorm1d(10))
    nn.init.zeros_(net.b[1].weight)
    return net


def zero_head() -> nn.Module:
    net = Residual(lambda s, h: torch.relu(h), torch.ones(1))
    nn.init.zeros_(net.head.weight)
    return net


HOSTS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda gate=gate: Residual(lambda s, h: torch.relu(h), gate.clone())
        for name, gate in GATES.items()
    },
    "a last layer of zeros": zero_layer,
    "a norm of zeros": zero_norm,
    "a head of zeros": zero_head,
}


@pytest.mark.parametrize("growth", ["early", "incubate"])
@pytest.mark.parametrize("host", HOSTS)
def test_what_begins_at_zero_grows(host: str, growth: str) -> None:
    net: Any = HOSTS[host]()
    before = {name: one.detach().clone() for name, one in net.named_parameters()}
    ran = run(net, growth=growth, each=partial(unmoved, before), steps=100)
    assert not [one for one in ran.warnings if "couples" in one], ran.warnings
    assert not [one for one in ran.outcomes() if "put back" in one["reason"]]
    assert net.a.out_features > 4


def unmoved(before: dict[str, Tensor], step: int, growth: esper.Growth) -> None:
    """Copies were stirred, not the host: one step of Adam moves an entry by its rate at most."""
    for name, one in growth.model.named_parameters() if step == 0 else ():
        assert float((one.detach() - before[name]).abs().max()) < 0.011, name


class Attention(nn.Module):
    """Causal attention whose output projection begins at zero, as in many GPTs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(*size) for size in [(10, 8)] * 3 + [(8, 10)])
        self.heads = 2
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        parts = [one(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for one in (self.q, self.k, self.v)]
        made = F.scaled_dot_product_attention(*parts, is_causal=True)
        return (x + self.out(made.transpose(1, 2).flatten(2))).mean(1)


def test_heads_before_a_projection_of_zeros_are_a_place() -> None:
    place = esper.wrap(Attention(), torch.randn(4, 6, 10), blueprints=["widen"]).places["q>out"]
    assert getattr(place, "causal", None) is True
