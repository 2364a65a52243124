"""What must not change: dormant, incubating, culled, materialised, copied."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.contracts import Stage
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.trial import Training
from esper.kasmina.widths.widen import WidenKernel
from esper.surgery.widen_layers import widen
from tests.kasmina.hosts import HOSTS, Loop, Residual, batch, frozen, holdings, loss_fn, same

KINDS = sorted(HOSTS)


def fed_and_trained(net: nn.Module, model: nn.Module, kind: str) -> list[Any]:
    """One training step and one evaluation through ``model``; everything they leave behind in ``net``."""
    torch.manual_seed(5)
    given = batch(kind)
    loss = loss_fn(model.train(), given)
    net.zero_grad()
    loss.backward()
    random = torch.get_rng_state()
    gradients = [p.grad for p in net.parameters()]
    with torch.no_grad():
        output = model.eval()(given[0])
    return frozen([loss, output, gradients, random, dict(net.state_dict())])


@pytest.mark.parametrize("kind", KINDS)
def test_a_dormant_wrap_changes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    net = HOSTS[kind]().train()
    bare, held, random = copy.deepcopy(net), holdings(net), torch.get_rng_state()
    parameters = list(net.parameters())
    wrapped = esper.wrap(net, batch(kind)[0] if kind != "mlp" else torch.randn(4, 10))
    torch.set_rng_state(random)
    assert holdings(net) == held
    assert same(dict(net.state_dict()), dict(bare.state_dict()))
    assert net.training
    assert list(wrapped.state_dict()) == list(bare.state_dict())
    assert same(fed_and_trained(net, wrapped, kind), fed_and_trained(bare, bare, kind))
    assert all(mine is theirs for mine, theirs in zip(parameters, net.parameters(), strict=True))
    net.train()
    assert holdings(net) == held


@pytest.mark.parametrize("kind", KINDS)
def test_wrapping_draws_no_random_number(kind: str) -> None:
    net, given = HOSTS[kind](), batch(kind)
    before = torch.get_rng_state()
    esper.wrap(net, given[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_steps_of_incubation_and_a_cull_leave_no_trace(kind: str) -> None:
    config = {"schedule": {"warmup": 0.01}, "race": {"steps": 100, "candidates": 4}}
    grown, plain = Loop(kind, config=config), Loop(kind, grow=False)
    held = holdings(plain.net)
    random = []
    for loop in (grown, plain):
        torch.manual_seed(3)
        loop.step(102)
        random.append(torch.get_rng_state())
    growth = grown.growth
    assert growth is not None
    trial = growth.run.orchestrator.oldest
    assert trial is not None
    assert growth.run.morphable.layout.stage_of(trial.origin.seed) is Stage.TRAINING
    assert isinstance(trial, Training)
    assert growth.steps - trial.started == 100
    assert any(float(w.detach().abs().max()) > 0 for w in trial.race.parameters.values()), "nothing learned"
    assert same(dict(grown.net.state_dict()), dict(plain.net.state_dict()))
    assert same(grown.optimizer.state_dict(), plain.optimizer.state_dict())
    assert torch.equal(*random)

    assert growth.finish() is grown.net
    assert [e.data["target"] for e in grown.of("stage")][-2:] == ["CULLED", "EMBARGOED"]
    assert holdings(grown.net) == held
    assert same(dict(grown.net.state_dict()), dict(plain.net.state_dict()))
    for loop in (grown, plain):
        torch.manual_seed(4)
        loop.growth = None
        loop.step(3)
    assert same(dict(grown.net.state_dict()), dict(plain.net.state_dict()))


@pytest.mark.parametrize("kind", KINDS)
def test_unwrapping_an_ungrown_model_gives_the_original_back(kind: str) -> None:
    net = HOSTS[kind]()
    held = holdings(net)
    wrapped = esper.wrap(net, batch(kind)[0])
    for site in wrapped.pairs:
        exposed(wrapped, site)
    assert holdings(net) != held
    assert esper.unwrap(wrapped) is net
    assert holdings(net) == held


def exposed(model: MorphableModel, site: str, units: int = 3) -> WidenKernel:
    """Open a site with a kernel of random weights at full strength."""
    layer = model.layer(site, refuse)
    kernel = WidenKernel(model.pairs[site], units).to(next(model.host.parameters()).dtype)
    with torch.no_grad():
        for parameter in kernel.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    seed = next(iter(model.seeds(site)))
    model.layout.alpha[seed] = 1.0
    for source, target in zip(
        (Stage.DORMANT, Stage.GERMINATED, Stage.TRAINING),
        (Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING),
        strict=True,
    ):
        model.layout.move(seed, source, target, 0)
    layer.kernel, layer.alpha, layer.exposed = (
        kernel.train(model.host.training),
        model.layout.alpha[seed],
        True,
    )
    return kernel


def refuse(error: str) -> None:
    raise AssertionError(error)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_materialised_model_equals_its_branch(kind: str, dtype: torch.dtype, training: bool) -> None:
    """Dropout is off: the two forms draw other numbers for the new units."""
    host = Residual(dropout=0.0) if kind == "residual" else HOSTS[kind]()
    host.to(dtype)
    x, _ = batch(kind, dtype=dtype)
    wrapped = esper.wrap(host, x)
    plain = copy.deepcopy(host).train(training)(x)
    depth = sum(1 for module in host.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    assert len(wrapped.pairs) >= 2
    for site in list(wrapped.pairs):
        wrapped.train(training)
        kernel = exposed(wrapped, site)
        buffers = {n: b.clone() for n, b in [*host.named_buffers(), *kernel.named_buffers()]}
        with torch.no_grad():
            branch = wrapped(x)
            for module in (host, kernel):
                for name, buffer in module.named_buffers():
                    buffer.copy_(buffers[name])
            plan = kernel.plan()
            wrapped.release(site)
            widen(host, plan, kernel.slices(plan))
            wrapped.refresh(lambda: None)
            wide = wrapped(x)
            for name, buffer in host.named_buffers():
                buffer[: len(buffers[name])].copy_(buffers[name]) if buffer.dim() else buffer.copy_(
                    buffers[name]
                )
        allowed = (1e-12 if dtype is torch.float64 else 2e-6) * float(branch.abs().max()) * math.sqrt(depth)
        assert float((branch - wide).abs().max()) <= allowed
        assert not torch.allclose(branch, plain, rtol=1e-3)


# -- copies --


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"pickle": by_pickle, "torch.save": by_torch_save, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_dormant_model_can_be_copied(kind: str, how: str) -> None:
    x = batch(kind)[0]
    wrapped = esper.wrap(HOSTS[kind](), x).eval()
    copied = COPIES[how](wrapped)
    assert torch.equal(copied(x), wrapped(x))
    assert list(copied.pairs) == list(wrapped.pairs)
    for name, pair in copied.pairs.items():
        assert pair.producer is copied.host.get_submodule(name.split(">")[0])
    assert esper.unwrap(copied) is not wrapped.host


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_awake_model_can_be_copied_and_the_copy_is_its_own(kind: str, how: str) -> None:
    x, y = batch(kind)
    wrapped = esper.wrap(HOSTS[kind](), x)
    held = holdings(wrapped.host)
    sites = list(wrapped.pairs)
    for site in sites:
        exposed(wrapped, site)
    loss_fn(wrapped, (x, y)).backward()  # what a pass leaves behind must not stand in the way
    wrapped.eval()
    with torch.no_grad():
        before = wrapped(x)
        copied = COPIES[how](wrapped)
        assert torch.equal(copied(x), before)
        for name, pair in copied.pairs.items():
            layer = copied.layers[name.replace(".", "_").replace(">", "__")]
            assert pair.producer is layer.place.producer is copied.host.get_submodule(name.split(">")[0])
        for kernel in [layer.kernel for layer in copied.layers.values()]:
            for parameter in kernel.parameters():
                parameter.zero_()
        assert not torch.equal(copied(x), before)
        host = esper.unwrap(copied)
        assert holdings(host) == held
        assert torch.equal(wrapped(x), before), "closing the copy closed the original"
        assert esper.unwrap(wrapped) is not host
    assert holdings(wrapped.host) == held


@pytest.mark.parametrize("how", COPIES)
def test_the_host_of_a_growing_run_can_be_copied_in_every_stage(how: str) -> None:
    """Users deepcopy the best model so far, whatever Esper is doing just then."""
    loop = Loop("mlp", config={"schedule": {"warmup": 0.01}, "race": {"steps": 8}})
    x = loop.probe[0][0]
    for stage in ("TRAINING", "GRAFTING", "EVALUATING"):
        loop.until(stage).step()
        copied = COPIES[how](loop.net)
        assert torch.equal(copied.eval()(x), loop.net.eval()(x))
        loop.net.train()
        copied.train()
        loss_fn(copied, loop.probe[0]).backward()
    loop.until("FOSSILISED" if loop.growth is None else "DORMANT")


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_checkpoint_loads_strictly_into_a_wrapped_model_and_back(kind: str) -> None:
    x = batch(kind)[0]
    torch.manual_seed(1)
    trained = HOSTS[kind]().eval()
    wrapped = esper.wrap(HOSTS[kind](), x).eval()
    wrapped.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(wrapped(x), trained(x))
    HOSTS[kind]().load_state_dict(wrapped.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapped.load_state_dict(dict(list(trained.state_dict().items())[1:]), strict=True)


def test_an_awake_model_keeps_the_hosts_keys_and_adds_its_own_behind_a_prefix() -> None:
    x = batch("mlp")[0]
    wrapped = esper.wrap(HOSTS["mlp"](), x)
    plain = list(wrapped.state_dict())
    exposed(wrapped, "fc1>fc2")
    keys = list(wrapped.state_dict())
    assert [k for k in keys if not k.startswith("_esper.")] == plain
    assert any("consumer_weight" in k for k in keys)
    before: Tensor = wrapped.eval()(x)
    saved = frozen(dict(wrapped.state_dict()))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.zero_()
    wrapped.load_state_dict(saved, strict=True)
    assert torch.equal(wrapped(x), before)


def test_a_sequential_host_keeps_its_length_and_its_order() -> None:
    net = nn.Sequential(
        nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(5, 2)
    )
    x = torch.randn(7, 4)
    wrapped = esper.wrap(net, x)
    assert list(wrapped.pairs) == ["0>2.0", "2.0>3"]
    before = net(x)
    for site in wrapped.pairs:
        exposed(wrapped, site)
    assert len(net) == 4
    assert [n for n, _ in net.named_modules()] == ["", "0", "1", "2", "2.0", "2.1", "3"]
    assert not torch.allclose(net(x), before)
    assert esper.unwrap(wrapped) is net
    assert torch.equal(net(x), before)
