"""Layers that one pass calls several times: what is found, what is refused, what units cost there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.errors import SiteError
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.recording.flops import FlopMeter
from esper.surgery.widen_layers import widen
from esper.tolaria.growth.run.check import outputs
from tests.kasmina.zoo import Net

Body = Callable[[Any, Tensor], Any]
FLAT, TOKENS, IMAGE = torch.randn(6, 4), torch.randn(6, 3, 4), torch.randn(6, 2, 5, 5)


def flat(body: Body, **more: nn.Module) -> Net:
    layers = {"a": nn.Linear(4, 6), "b": nn.Linear(6, 3), "c": nn.Linear(6, 3)}
    return Net(body, **{**layers, **more})


def images(body: Body) -> Net:
    layers = {"a": nn.Conv2d(2, 6, 3, bias=False), "norm": nn.BatchNorm2d(6), "b": nn.Linear(54, 3)}
    return Net(body, **layers)


def views(s: Any, x: Tensor, act: Callable[[Tensor], Tensor] = torch.relu) -> tuple[Tensor, Tensor]:
    return s.b(act(s.a(x))), s.b(act(s.a(-x)))


def interleaved(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    one, other = s.a(x), s.a(-x)
    return s.b(torch.relu(one)), s.b(torch.relu(other))


def thrown_away(s: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        s.b(torch.relu(s.a(-x)))
    y: Tensor = s.b(torch.relu(s.a(x)))
    return y


def unrolled(s: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + s.back(torch.tanh(s.a(x)))
    return x


def forked(s: Any, x: Tensor) -> list[Tensor]:
    hs = [torch.relu(s.a(view)) for view in (x, -x)]
    return [y for h in hs for y in (s.b(h), s.c(h * 2))]


def gated(s: Any, x: Tensor) -> list[Tensor]:
    return [s.b(F.silu(s.a(view)) * s.up(view)) for view in (x, -x)]


def pictures(s: Any, x: Tensor) -> list[Tensor]:
    return [s.b(torch.relu(s.norm(s.a(view))).flatten(1)) for view in (x, x.flip(-1))]


FOUND: dict[str, tuple[Net, Tensor, str, int]] = {
    "two views": (flat(views), FLAT, "a>b", 2),
    "tokens": (flat(views), TOKENS, "a>b", 2),
    "all producers first": (flat(interleaved), FLAT, "a>b", 2),
    "of another size": (
        flat(lambda s, x: (s.b(torch.relu(s.a(x))), s.b(torch.relu(s.a(x[:2]))))),
        FLAT,
        "a>b",
        2,
    ),
    "a batch norm in each chain": (images(pictures), IMAGE, "a>b", 2),
    "thrown away": (flat(thrown_away), FLAT, "a>b", 2),
    "unrolled": (flat(unrolled, back=nn.Linear(6, 4)), FLAT, "a>back", 3),
    "a fork": (flat(forked), FLAT, "a>b+c", 2),
    "a gated pair": (flat(gated, up=nn.Linear(4, 6)), FLAT, "a*up>b", 2),
}


@pytest.mark.parametrize("case", FOUND)
def test_calls_that_lead_alike_are_one_place_that_widens_exactly_at_its_cost(case: str) -> None:
    net, x, name, calls = FOUND[case]
    net, x = net.double(), x.double()
    wrapped = esper.wrap(net, x, blueprints=["widen"])
    place = wrapped.pairs[name]
    assert place.site.calls == calls
    wrapped.train()
    exits = dict(zip(place.site.exits, place.ends()[1:], strict=True))
    before, flops = outputs(wrapped, exits, lambda: net(x)), metered(net, x)
    kernel = place.kernel(3)
    with torch.no_grad():
        for own in [n for n, _ in kernel.named_parameters() if n not in kernel.outgoing]:
            kernel.get_parameter(own).normal_()
    plan = kernel.plan()
    widen(net, plan, kernel.slices(plan))
    wrapped.refresh(lambda: net(x))
    after = outputs(wrapped, exits, lambda: net(x))
    for path, said in before.items():
        assert len(said) == calls
        for one, other in zip(said, after[path], strict=True):
            assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    half = 0.5 * 3 * len(x)  # what counts per unit and example is a whole number
    assert metered(net, x) - flops == pytest.approx(3 * place.site.unit_flops * len(x), abs=half)
    assert wrapped.pairs[name].site.width == place.site.width + 3
    assert wrapped.pairs[name].site.calls == calls


def metered(net: nn.Module, x: Tensor) -> int:
    with FlopMeter() as meter:
        net.eval()(x)
    return meter.total


def attending(s: Any, x: Tensor) -> Tensor:
    q, k, v = (part(x).unflatten(-1, (-1, 2)).transpose(1, 2) for part in (s.q, s.k, s.v))
    y: Tensor = s.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return y


def training_twice(s: Any, x: Tensor) -> Any:
    return views(s, x) if s.training else s.b(torch.relu(s.a(x)))


REFUSED: dict[str, tuple[Body, str]] = {
    "other steps": (
        lambda s, x: (s.b(torch.relu(s.a(x))), s.b(torch.tanh(s.a(-x)))),
        "a is called 2 times in a pass, and not alike: a → relu → b at call 1, a → tanh → b at call 2",
    ),
    "other arguments": (
        lambda s, x: (s.b(F.leaky_relu(s.a(x), 0.1)), s.b(F.leaky_relu(s.a(-x), 0.2))),
        "not alike: a → leaky_relu → b has other arguments at call 2 than at call 1",
    ),
    "another consumer": (
        lambda s, x: (s.b(torch.relu(s.a(x))), s.c(torch.relu(s.a(-x)))),
        "b is called once in a pass and a 2 times; every call of the one must lead to a call of the other",
    ),
    "a consumer's call left over": (
        lambda s, x: (s.b(torch.relu(s.a(x))), s.b(s.six(x))),
        "b is called 2 times in a pass and a once",
    ),
    "returned at one call": (
        lambda s, x: (s.b(torch.relu(s.a(x))), s.b(h := torch.relu(s.a(-x))), h),
        "call 2 of a leads nowhere: the output of a is an output of the model",
    ),
    "thrown away before the consumer": (
        lambda s, x: (s.b(torch.relu(s.a(x))), s.a(-x).shape)[0],
        "b is called once in a pass and a 2 times",
    ),
    "used twice at one call": (
        lambda s, x: (
            s.b(torch.relu(s.a(x))),
            s.b(h := torch.relu(s.a(-x))),
            s.c(h),
        ),
        "c is called once in a pass and a 2 times",
    ),
    "in another order": (
        lambda s, x: (h := torch.relu(s.a(x)), s.b(torch.relu(s.a(-x))), s.b(h))[1:],
        "call 1 of a leads to call 2 of b; both must be called in the same order",
    ),
    "a norm in one chain only": (
        lambda s, x: (s.b(s.norm(s.a(x))), s.b(s.a(-x))),
        "norm between a and its consumer is called once, or read elsewhere; a is called 2 times",
    ),
    "a norm that is called beside": (
        lambda s, x: (s.b(s.norm(s.a(x))), s.b(s.norm(s.a(-x))), s.norm(s.six(x))),
        "norm between a and its consumer is called 3 times, or read elsewhere; a is called 2 times",
    ),
    "in training only": (
        training_twice,
        "a is called 2 times in a pass in training and once in eval mode",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_that_differ_are_refused_and_the_difference_is_named(case: str) -> None:
    body, reason = REFUSED[case]
    net = flat(body, six=nn.Linear(4, 6), norm=nn.BatchNorm1d(6))
    whole = Net(lambda s, x: (s.net(x), s.two(torch.relu(s.one(x)))), net=net, **beside())
    wrapped = esper.wrap(whole, FLAT.float(), blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    assert reason in told["net.a"].replace("net.", "")


def beside() -> dict[str, nn.Module]:
    return {"one": nn.Linear(4, 3), "two": nn.Linear(3, 3)}


def test_heads_and_recurrent_layers_are_widened_where_they_are_called_once() -> None:
    layers = {name: nn.Linear(4, 4) for name in "qkvo"}
    net = Net(
        lambda s, x: (
            attending(s, x),
            attending(s, -x),
            s.two(s.rnn(x)[0]),
            s.two(s.rnn(-x)[0]),
            s.d(torch.relu(s.one(x))),
        ),
        **layers,
        rnn=nn.GRU(4, 3, batch_first=True),
        **beside(),
        d=nn.Linear(3, 3),
    )
    wrapped = esper.wrap(net, TOKENS.float(), blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    assert list(wrapped.pairs) == ["one>d"]
    assert "q is called 2 times in a pass; here it may be called once" in told["q"]
    assert "rnn is called 2 times" in told["rnn"]


def test_a_race_takes_one_call_and_says_what_takes_more() -> None:
    net = Net(views, a=nn.Linear(4, 6), b=nn.Linear(6, 3))
    x = FLAT.float()
    with pytest.raises(SiteError, match=r"a is called 2 times in a pass.*growth='early' can widen it"):
        MorphableModel(net.float(), lambda m: m(x), len(x), blueprints=["widen"], raced=True)
    planned = esper.plan(net, x, steps=100)
    assert planned.growth == "early"
    assert [row["name"] for row in planned.sites] == ["a>b"]
    raced = esper.plan(
        Net(lambda s, x: (s.net(x), s.two(s.one(x))), net=net, **beside()), x, growth="incubate"
    )
    assert [row["name"] for row in raced.sites] == ["one>two"]
    assert "growth='early' can widen it" in " ".join(str(raced).split())


def test_every_call_of_an_exit_is_kept_for_the_check() -> None:
    net = flat(views).float()
    wrapped = esper.wrap(net, FLAT.float(), blueprints=["widen"])
    first, second = outputs(wrapped, {"b": net.b}, lambda: net(FLAT.float()))["b"]
    with torch.no_grad():
        assert torch.equal(first, net(FLAT.float())[0])
        assert torch.equal(second, net(FLAT.float())[1])
