"""Forks: one producer whose output several layers read."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import esper
from esper.contracts import WidenPlan
from esper.errors import SiteError
from esper.kasmina.evidence.growth_cost import GrowthCost
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.recording.flops import FlopMeter
from esper.kasmina.widths.fork import Fork, ForkKernel
from esper.surgery.widen_layers import widen
from tests.kasmina.zoo import Net

Body = Callable[[Any, Tensor], Any]


def trunk(body: Body, **more: nn.Module) -> Net:
    """Two heads over one hidden layer; the body is given its output."""
    sizes = {"a": (4, 6), "c": (6, 3), "m": (6, 2)}
    layers = {n: nn.Linear(*size) for n, size in sizes.items()}
    return Net(lambda s, x: body(s, s.a(x)), **{**layers, **more})


def both(s: Any, h: Tensor) -> dict[str, Tensor]:
    return {"digit": s.c(h), "ink": s.m(h)}


def images(body: Body, **more: nn.Module) -> Net:
    layers = {"a": nn.Conv2d(2, 6, 3, padding=1, bias=False), "c": nn.Conv2d(6, 3, 3), "m": nn.Linear(96, 2)}
    return Net(lambda s, x: body(s, s.a(x)), **{**layers, **more})


def one_convolution_one_linear(s: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    h = torch.relu(s.norm(h))
    return s.c(h), s.m(F.max_pool2d(h, 2).flatten(1))


def nested(s: Any, h: Tensor) -> tuple[Tensor, ...]:
    h = torch.relu(h)
    g = s.norm(torch.tanh(h))
    return s.c(h), s.m(g), s.k(torch.sigmoid(g))


def attending(s: Any, h: Tensor) -> Tensor:
    h = torch.relu(h)
    return (s.c(h) @ s.k(h).transpose(-2, -1)).softmax(-1) @ s.m(h)


DRAWN = torch.Generator().manual_seed(0)
FLAT, TOKENS, IMAGE = (torch.randn(5, *shape, generator=DRAWN) for shape in ((4,), (3, 4), (2, 8, 8)))
FOUND: dict[str, tuple[Net, Tensor, str, tuple[str, ...]]] = {
    "two heads": (trunk(lambda s, h: both(s, torch.relu(h))), FLAT, "a>c+m", ("relu",)),
    "no step": (trunk(both), FLAT, "a>c+m", ()),
    "tokens": (trunk(lambda s, h: both(s, F.gelu(h))), TOKENS, "a>c+m", ("gelu",)),
    "in the order they run": (trunk(lambda s, h: (s.m(h), s.c(h))), FLAT, "a>m+c", ()),
    "steps apart": (
        trunk(lambda s, h: (s.c(h), s.m(torch.tanh(h * 2)))),
        FLAT,
        "a>c+m",
        ("m: mul → tanh",),
    ),
    "an activation by hand on one branch": (
        trunk(lambda s, h: (s.c(torch.relu(h)), s.m(h * torch.sigmoid(h)))),
        FLAT,
        "a>c+m",
        ("c: relu", "m: sigmoid+mul"),
    ),
    "an activation by hand before": (
        trunk(lambda s, h: both(s, h * torch.sigmoid(h))),
        FLAT,
        "a>c+m",
        ("sigmoid+mul",),
    ),
    "in place, behind the first head": (
        trunk(lambda s, h: (s.c(h), s.m(h.relu_()))),
        FLAT,
        "a>c+m",
        ("m: relu_",),
    ),
    "nested": (
        trunk(nested, norm=nn.BatchNorm1d(6), k=nn.Linear(6, 2)),
        FLAT,
        "a>c+m+k",
        ("relu", "m: tanh → BatchNorm1d norm", "k: tanh → BatchNorm1d norm → sigmoid"),
    ),
    "a convolution and a linear layer": (
        images(one_convolution_one_linear, norm=nn.BatchNorm2d(6)),
        IMAGE,
        "a>c+m",
        ("BatchNorm2d norm", "relu", "m: max_pool2d → flatten"),
    ),
    "groups": (
        images(one_convolution_one_linear, norm=nn.GroupNorm(3, 6)),
        IMAGE,
        "a>c+m",
        ("GroupNorm norm", "relu", "m: max_pool2d → flatten"),
    ),
    "a norm on one branch": (
        images(lambda s, h: (s.c(h), s.m(F.max_pool2d(s.norm(h), 2).flatten(1))), norm=nn.BatchNorm2d(6)),
        IMAGE,
        "a>c+m",
        ("m: BatchNorm2d norm → max_pool2d → flatten",),
    ),
    "projections of a hidden layer": (
        trunk(attending, k=nn.Linear(6, 3)),
        TOKENS,
        "a>c+k+m",
        ("relu",),
    ),
}


def said(net: nn.Module, x: Tensor) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(net(x))[0] if isinstance(leaf, Tensor)]


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", FOUND)
def test_new_units_change_nothing_at_birth_and_widen_as_their_branches_compute(
    case: str, training: bool
) -> None:
    """Twice, one after the other."""
    torch.manual_seed(0)
    net, x, name, between = FOUND[case]
    net, x = net.double(), x.double()
    wrapped = esper.wrap(net, x, blueprints=["widen"]).train(training)
    assert list(wrapped.pairs) == [name]
    for units in (3, 2):
        fork = wrapped.pairs[name]
        assert isinstance(fork, Fork)
        assert fork.site.between == between
        units *= fork.site.granularity
        kernel = fork.kernel(units)
        assert isinstance(kernel, ForkKernel)
        seen: list[Tensor] = []
        handle = fork.producer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            before, parameters = said(net, x), wrapped.parameter_count()
            handle.remove()
            assert not any(added.any() for added in kernel(seen[0]))
            silent = kernel.plan()
            undo = widen(net, silent, kernel.slices(silent))
            assert close(said(net, x), before), "at birth"
            undo.undo()
            for outgoing in kernel.outgoing:
                kernel.get_parameter(outgoing).normal_()
            added = kernel(seen[0])
            hooks = [
                consumer.register_forward_hook(lambda _, args, y, more=more: y + more)
                for consumer, more in zip(fork.ends()[1:], added, strict=True)
            ]
            branch = said(net, x)
            for hook in hooks:
                hook.remove()
            plan = kernel.plan()
            told = GrowthCost(net, {name: fork})({name: units})
            flops = metered(net, x)
            widen(net, plan, kernel.slices(plan))
            wrapped.refresh(lambda: net(x))
            assert close(said(net, x), branch)
            assert not close(branch, before)
            assert wrapped.parameter_count() == parameters + units * fork.site.unit_parameters
            assert told == (units * fork.site.unit_parameters, units * fork.site.unit_flops)
            counted = metered(net, x) - flops
            if case != "projections of a hidden layer":  # whose products of activations stay as they are
                assert counted == units * fork.site.unit_flops * len(x)
        assert wrapped.pairs[name].site.width == fork.site.width + units


def metered(net: nn.Module, x: Tensor) -> int:
    with FlopMeter() as meter:
        net(x)
    return meter.total


REFUSED: dict[str, tuple[Body, str]] = {
    "an output, too": (lambda s, h: (s.c(h), s.m(h), h), "the output of a is an output of the model"),
    "a residual": (
        lambda s, h: s.c(h) + s.m(h) @ torch.ones(2, 3) + s.d(h + torch.relu(s.k(h))),
        r"the output of a has 4 consumers \(.*\); the output of a meets another tensor in add",
    ),
    "a softmax on one": (
        lambda s, h: (s.c(h), s.m(h.softmax(-1))),
        r"has 2 consumers \(linear, softmax\); softmax over the output of a does not treat every",
    ),
    "a penalty on what is active": (lambda s, h: (s.c(h), s.m(h), h.abs().mean()), "has 3 consumers.*; mean"),
    "a layer that is called twice": (lambda s, h: (s.c(h), s.c(torch.relu(h))), "c is called 2 times"),
    "an output behind a step": (lambda s, h: (s.c(h), torch.relu(h)), "is an output of the model"),
    "one calls the other": (lambda s, h: s.c(h * s.k(h)), r"has 2 consumers \(.*\); .*meets another tensor"),
    "joined": (lambda s, h: s.c(torch.cat([h, torch.relu(h)], -1)[..., :6]), r"has 2 consumers \(.*cat.*\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_partings_are_refused_with_the_reason(case: str) -> None:
    body, reason = REFUSED[case]
    net = trunk(body, k=nn.Linear(6, 6), d=nn.Linear(6, 3), one=nn.Linear(4, 3), two=nn.Linear(3, 3))
    whole = Net(lambda s, x: (s.net(x), s.net.two(torch.relu(s.net.one(x)))), net=net)
    wrapped = esper.wrap(whole, FLAT.float(), blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    found = re.sub(r"\bnet\.", "", told["net.a"])
    assert re.search(reason, found), found


def test_a_path_that_differs_in_eval_mode_is_refused() -> None:
    net = trunk(lambda s, h: (s.c(h), s.m(torch.relu(h) if s.training else h)))
    wrapped = Net(
        lambda s, x: (s.net(x), s.two(torch.relu(s.one(x)))),
        net=net,
        one=nn.Linear(4, 3),
        two=nn.Linear(3, 1),
    )
    told = {refusal.place: refusal.reason for refusal in esper.wrap(wrapped, FLAT.float()).refusals}
    assert "takes another path in eval mode" in told["net.a"]


def test_a_plan_names_every_consumer() -> None:
    net, _, name, _ = FOUND["a convolution and a linear layer"]
    fork = esper.wrap(net.float(), IMAGE.float(), blueprints=["widen"]).pairs[name]
    plan = fork.plan(2)
    assert isinstance(plan, WidenPlan)
    width = fork.site.width
    grown = {(e.name, e.axis): e.new - e.old for e in plan.edits}
    assert grown == {
        ("a.weight", 0): 2,
        ("norm.weight", 0): 2,
        ("norm.bias", 0): 2,
        ("norm.running_mean", 0): 2,
        ("norm.running_var", 0): 2,
        ("c.weight", 1): 2,
        ("m.weight", 1): 32,
    }
    assert ("m", "in_features", (width + 2) * 16) in plan.attributes
    assert ("c", "in_channels", width + 2) in plan.attributes


def test_making_a_plan_draws_no_random_number() -> None:
    net, _, name, _ = FOUND["two heads"]
    fork = esper.wrap(net.float(), FLAT.float()).pairs[name]
    state = torch.get_rng_state()
    fork.plan(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_race_takes_no_forks_and_says_what_does() -> None:
    net = trunk(lambda s, h: both(s, torch.relu(h)))
    with pytest.raises(SiteError, match=r"a has 2 consumers \(c, m\).*growth='early' can widen it"):
        MorphableModel(net, lambda m: m(FLAT), len(FLAT), blueprints=["widen"], raced=True)


def test_sites_can_be_chosen_by_any_consumer() -> None:
    net = trunk(lambda s, h: both(s, torch.relu(h)))
    assert list(esper.wrap(net, FLAT.float(), sites="m").places) == ["a>c+m"]


def test_it_is_listed_readably() -> None:
    net = trunk(lambda s, h: (s.c(torch.relu(h)), s.m(h)))
    planned = esper.plan(net, FLAT.float(), steps=100)
    assert planned.growth == "early"
    assert planned.decisions
    assert re.search(r"a>c\+m +c: relu +6 ", str(planned)), str(planned)
    raced = esper.plan(net, FLAT.float(), steps=100, growth="incubate")
    assert not [row for row in raced.sites if row["kind"] == "pair"]
    assert "growth='early' can widen it" in " ".join(str(raced).split())
