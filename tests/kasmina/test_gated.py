"""Gated pairs: two producers, a product, one consumer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.kasmina.recording.flops import FlopMeter
from esper.kasmina.widths.gated import GatedKernel, GatedPair
from esper.surgery.widen_layers import widen
from tests.kasmina.zoo import Net

Body = Callable[[Any, Tensor], Tensor]


def gated(body: Body, bias: bool = True, **more: nn.Module) -> Net:
    sizes = {"gate": (4, 6), "up": (4, 6), "down": (6, 3)}
    return Net(body, **{n: nn.Linear(*size, bias=bias) for n, size in sizes.items()}, **more)


def convolutional() -> Net:
    def body(s: Any, x: Tensor) -> Tensor:
        return s.down(F.max_pool2d(torch.tanh(s.gate(x)) * torch.sigmoid(s.norm(s.up(x))), 2))

    layers = {n: nn.Conv2d(2, 6, 3, padding=1) for n in ("gate", "up")}
    return Net(body, **layers, norm=nn.BatchNorm2d(6), down=nn.Conv2d(6, 3, 3))


FLAT, IMAGE = torch.randn(5, 4), torch.randn(5, 2, 8, 8)
FOUND: dict[str, tuple[Net, Tensor, str]] = {
    "GLU": (gated(lambda s, x: s.down(torch.sigmoid(s.gate(x)) * s.up(x))), FLAT, "gate*up>down"),
    "SwiGLU": (gated(lambda s, x: s.down(F.silu(s.gate(x)) * s.up(x)), bias=False), FLAT, "gate*up>down"),
    "up first": (gated(lambda s, x: s.down(s.up(x) * F.gelu(s.gate(x)))), FLAT, "up*gate>down"),
    "bilinear": (gated(lambda s, x: s.down(s.gate(x).mul(s.up(x)))), FLAT, "gate*up>down"),
    "behind the product": (
        gated(lambda s, x: s.down(s.norm(torch.relu(s.gate(x)) * s.up(x)) + 1), norm=nn.BatchNorm1d(6)),
        FLAT,
        "gate*up>down",
    ),
    "by hand": (
        gated(lambda s, x: (lambda g: s.down(g * torch.sigmoid(g) * s.up(x)))(s.gate(x))),
        FLAT,
        "gate*up>down",
    ),
    "tokens": (gated(lambda s, x: s.down(F.silu(s.gate(x)) * s.up(x))), torch.randn(5, 3, 4), "gate*up>down"),
    "convolutions": (convolutional(), IMAGE, "gate*up>down"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", FOUND)
def test_new_units_change_nothing_at_birth_and_widen_as_their_branch_computes(
    case: str, training: bool
) -> None:
    torch.manual_seed(0)
    net, x, name = FOUND[case]
    net, x = net.double(), x.double()
    wrapped = esper.wrap(net, x).train(training)
    pair = wrapped.pairs[name]
    assert isinstance(pair, GatedPair)
    assert list(wrapped.pairs) == [name]
    kernel = pair.kernel(3)
    assert isinstance(kernel, GatedKernel)
    assert kernel.axes["producer_weight"] == kernel.axes["partner_weight"] == 0
    seen: list[Tensor] = []
    pair.producer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        before, parameters, flops = net(x), wrapped.parameter_count(), wrapped.flops
        assert not kernel(seen[0]).any()
        kernel.consumer_weight.normal_()
        added = kernel(seen[0])
        handle = pair.consumer.register_forward_hook(lambda _, args, y: y + added)
        branch = net(x)
        handle.remove()
        plan = kernel.plan()
        widen(net, plan, kernel.slices(plan))
        wrapped.refresh(lambda: net(x))
        torch.testing.assert_close(net(x), branch, rtol=0, atol=1e-12)
        assert not torch.allclose(branch, before)
        assert wrapped.parameter_count() == parameters + 3 * pair.site.unit_parameters
        with FlopMeter() as meter:
            net.eval()(x)
        assert meter.total == (flops + 3 * pair.site.unit_flops) * len(x)
    assert wrapped.pairs[name].site.width == pair.site.width + 3


def two_inputs(s: Any, x: Tensor) -> Tensor:
    return s.down(s.gate(x) * s.up(x.flip(-1)))


REFUSED: dict[str, tuple[Body, str, str]] = {
    "two inputs": (two_inputs, "gate", "meets another tensor in mul"),
    "second": (lambda s, x: s.down(s.gate(x) * s.up(x)), "up", "up is widened with gate"),
    "a third factor": (lambda s, x: s.down(s.gate(x) * s.up(x) * x.sum()), "gate", "meets another tensor in"),
    "a sum": (lambda s, x: s.down(s.gate(x) + s.up(x)), "gate", "meets another tensor in add"),
    "read twice": (
        lambda s, x: (lambda g: s.down(g * s.up(x)) + g.sum())(s.gate(x)),
        "gate",
        r"has 2 consumers \(mul, sum\)",
    ),
    "fused": (lambda s, x: s.down(F.glu(s.fused(x), -1)), "fused", "glu .*fused"),
    "chunked": (
        lambda s, x: (lambda a, b: s.down(F.silu(a) * b))(*s.fused(x).chunk(2, -1)),
        "fused",
        "chunk .*fused",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_products_are_refused_with_the_reason(case: str) -> None:
    body, place, reason = REFUSED[case]
    net = gated(body, fused=nn.Linear(4, 12), one=nn.Linear(4, 3), two=nn.Linear(3, 3))
    whole = Net(lambda s, x: s.net(x) + s.net.two(torch.relu(s.net.one(x))), net=net)
    wrapped = esper.wrap(whole, FLAT.float(), blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    assert f"net.{place}" in told
    pattern = reason.replace("up is widened with gate", "net.up is widened with net.gate")
    assert re.search(pattern, told[f"net.{place}"]), told[f"net.{place}"]
