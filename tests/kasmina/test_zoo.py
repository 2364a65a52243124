"""Hosts of many kinds: where they can grow, that nothing is felt before, and that growth is exact."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.contracts import Stage
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.widths.layers import is_depthwise, is_layer
from esper.kasmina.widths.recurrent import RecurrentPair
from esper.kasmina.widths.widen import HostKernel
from esper.surgery.widen_layers import widen
from tests.kasmina.hosts import frozen, holdings, same
from tests.kasmina.zoo import HOSTS, batch, logits, loss_fn, run

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap, some hosts
WIDEN = ["widen"]

REASONS = {  # what cannot be widened, and why: one of each kind of reason
    "tied autoencoder": ("embed", "read by linear|called|times|read by more than its own call"),
    "ResNeXt": ("blocks.0.conv1", r"blocks.0.mid is grouped"),
    "DenseNet": ("stem", "consumers|meets another tensor in cat"),
    "squeeze and excite": ("conv1", r"has 2 consumers \(adaptive_avg_pool2d, mul\)"),
    "inception": ("one", "meets another tensor in cat"),
    "soft mixture": ("gate", "softmax over the output"),
    "encoder-decoder": ("decoder.cross.q", r"read different inputs \(cross-attention\)"),
    "nn.TransformerEncoderLayer": ("layer.self_attn.out_proj", "nn.MultiheadAttention"),
    "two towers": ("user.2", "meets another tensor in mul"),
    "mlp with LayerNorm": ("fc2", r"LayerNorm norm \(layer_norm\) stands between"),
    "GPT": ("head", "tied to embed"),
    "ViT": ("layers.0.attention.k", "widened with layers.0.attention.q, as heads"),
}


def host(kind: str, dropout: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = HOSTS[kind].build()
    for module in net.modules():
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    return net


@pytest.mark.parametrize("kind", HOSTS)
def test_every_layer_of_every_host_is_a_place_or_has_a_reason(kind: str) -> None:
    net = host(kind)
    wrapped = esper.wrap(net, HOSTS[kind].inputs(), blueprints=WIDEN)
    assert len(wrapped.pairs) == HOSTS[kind].sites, list(wrapped.pairs)
    layers = {n for n, m in net.named_modules() if holds_matrices(m) and not is_depthwise(m)}
    entries = {place.site.entry for place in wrapped.pairs.values()}
    assert entries | {refusal.place for refusal in wrapped.refusals} == layers


def holds_matrices(module: nn.Module) -> bool:
    return any(own is not None and own.dim() > 1 for own in module._parameters.values())


@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_widened_says_why(kind: str) -> None:
    place, reason = REASONS[kind]
    wrapped = esper.wrap(host(kind), HOSTS[kind].inputs(), blueprints=WIDEN)
    (told,) = [refusal.reason for refusal in wrapped.refusals if refusal.place == place]
    assert re.search(reason, told), told


@pytest.mark.parametrize("kind", HOSTS)
def test_a_dormant_wrap_changes_nothing(kind: str) -> None:
    net, given = host(kind), batch(kind)
    bare, held, random = copy.deepcopy(net), holdings(net), torch.get_rng_state()
    wrapped = esper.wrap(net, given[0], blueprints=WIDEN)
    assert torch.equal(torch.get_rng_state(), random)
    assert holdings(net) == held
    assert list(wrapped.state_dict()) == list(bare.state_dict())
    left = []
    for own, model in ((net, wrapped), (bare, bare)):
        torch.manual_seed(1)
        loss = loss_fn(model.train(), given)
        loss.backward()
        with torch.no_grad():
            output = logits(run(model.eval(), given[0]))
        left.append(frozen([loss, output, [p.grad for p in own.parameters()], dict(own.state_dict())]))
    assert same(*left)


@pytest.mark.parametrize("kind", HOSTS)
def test_incubation_and_a_cull_leave_no_trace(kind: str) -> None:
    hosts: list[tuple[nn.Module, torch.optim.Optimizer, list[Tensor]]] = []
    for grown in (True, False):
        net = host(kind)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        held = holdings(net)
        torch.manual_seed(1)
        probe = [batch(kind) for _ in range(12)]
        growth = None
        if grown:
            config = {"schedule": {"warmup": 0.01}, "race": {"steps": 50, "candidates": 2}}
            config["gate"] = {"false_keep": 0.5, "looks": 1}  # so few examples could never pass a strict one
            options: dict[str, Any] = {"probe": probe, "steps": 100, "config": config, "growth": "incubate"}
            growth = esper.grow(net, optimizer, loss_fn, **options)
        torch.manual_seed(2)
        losses = []
        for _ in range(6):
            given = batch(kind)
            optimizer.zero_grad()
            loss = loss_fn(net, given)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            if growth is not None:
                growth.step(given, loss)
        if growth is not None:
            trial = growth.run.orchestrator.oldest
            assert trial is not None, "nothing was incubated"
            assert growth.run.morphable.layout.stage_of(trial.origin.seed) is Stage.TRAINING
            assert growth.finish() is net
        assert holdings(net) == held
        hosts.append((net, optimizer, losses))
    (one, first, mine), (two, second, theirs) = hosts
    assert same(mine, theirs)
    assert same(dict(one.state_dict()), dict(two.state_dict()))
    assert same(first.state_dict(), second.state_dict())


def exposed(model: MorphableModel, site: str, units: int) -> HostKernel:
    """Open a site with a kernel of random weights at full strength."""
    kernel = model.pairs[site].kernel(units)
    assert isinstance(kernel, HostKernel)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.normal_(std=0.3)
    layer = model.layer(site, refuse)
    layer.kernel, layer.alpha, layer.exposed = kernel, torch.ones(()), True
    return kernel


def refuse(error: str) -> None:
    raise AssertionError(error)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", HOSTS)
def test_every_place_of_every_host_widens_as_its_branch_computed(kind: str, training: bool) -> None:
    """Dropout is off: the two forms draw other numbers for the new units."""
    net, given = host(kind, dropout=False), batch(kind)
    wrapped = esper.wrap(net, given[0], blueprints=WIDEN)
    names, attributes, moved = [n for n, _ in net.named_parameters()], {}, list[bool]()
    depth = sum(1 for module in net.modules() if is_layer(module))
    for site in [name for name, place in wrapped.pairs.items() if not place.site.others]:  # see test_fork.py
        wrapped.train(training)
        granularity, unit = wrapped.pairs[site].site.granularity, wrapped.pairs[site].site.unit_parameters
        with torch.no_grad():
            before = logits(run(wrapped, given[0]))
            kernel = exposed(wrapped, site, 2 * granularity)
            parameters = wrapped.parameter_count()
            branch = logits(run(wrapped, given[0]))
            wrapped.release(site)
            held = {n for n, _ in [*kernel.named_parameters(), *kernel.named_buffers()]}
            assert set(kernel.axes) == held - {n for n in held if n.startswith("weight_hh")}
            plan = kernel.plan()
            widen(net, plan, kernel.slices(plan))
            wrapped.refresh(lambda: run(net, given[0]))
            wide = logits(run(wrapped, given[0]))
        allowed = HOSTS[kind].exact * 4e-6 * math.sqrt(depth) * float(branch.abs().max())
        assert float((branch - wide).abs().max()) <= allowed, site
        moved.append(not torch.equal(before, branch))
        attributes.update({(m, a): v for m, a, v in plan.attributes})
        added = 2 * granularity * unit
        if isinstance(wrapped.pairs[site], RecurrentPair):  # what is told holds where the size doubles
            assert parameters < wrapped.parameter_count() <= parameters + added
        else:
            assert wrapped.parameter_count() == parameters + added
    assert any(moved), "no branch did anything"
    assert [n for n, _ in net.named_parameters()] == names
    modules = dict(net.named_modules())
    assert all(getattr(modules[m], a) == v for (m, a), v in attributes.items())
    trained(net.train(), kind)


def trained(net: nn.Module, kind: str) -> None:
    """Two steps."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_fn(net, batch(kind))
        loss.backward()
        optimizer.step()
        assert bool(torch.isfinite(loss))
