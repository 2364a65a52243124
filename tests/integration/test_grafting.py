"""Kernels that stay: exact when kept, seen by all that sees a module, saved, rebuilt, exported, resumed."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.contracts import Decision, Event
from esper.errors import SurgeryError
from esper.saving.genome import GraftPlan
from esper.surgery.isolation.seam import is_open
from tests.integration.grafting_hosts import HOSTS, INPUTS, Sequences

PLACES = [
    ("vectors", "0+residual_mlp"),
    ("vectors", "0+low_rank"),
    ("vectors", "3+gated"),
    ("images", "0+conv3x3"),
    ("images", "0+squeeze_excite"),
    ("sequences", "blocks.0+bottleneck_adapter"),
    ("sequences", "blocks.1+causal_attention"),
    ("sequences", "blocks.0.mix+swiglu_mlp"),
]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    y = model(batch[0])
    return F.cross_entropy(y.flatten(0, -2), batch[1].flatten())


def batch(kind: str, n: int = 24) -> tuple[Tensor, Tensor]:
    x = INPUTS[kind](n)
    return x, torch.randint(0, 11, x.shape if kind == "sequences" else (n,))


class Kept:
    """A model in which one kernel, its weights drawn at random, was made to stay."""

    def __init__(self, kind: str, site: str, net: nn.Module | None = None, **given: Any) -> None:
        torch.manual_seed(0)
        self.kind, self.net = kind, HOSTS[kind]() if net is None else net
        self.plain = copy.deepcopy(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        self.events: list[Event] = []
        self.step()  # the optimizer has state by now
        self.growth = esper.grow(
            self.net, self.optimizer, loss_fn, probe=[batch(kind)], steps=100,
            config={"blueprints": [site.partition("+")[2]]}, on_event=self.events.append, **given,
        )  # fmt: skip
        self.x = batch(kind)[0]
        self.before = self.net.eval()(self.x).detach()
        layer = self.growth.run.morphable.layer(site, pytest.fail)
        units = layer.place.site.granularity * (1 if layer.place.site.most == 1 else 2)
        layer.kernel = kernel = layer.place.kernel(units)
        with torch.no_grad():
            for name in kernel.outgoing:
                kernel.get_parameter(name).normal_(std=0.3)
        layer.alpha, layer.exposed = torch.ones(()), True
        self.branch = self.net(self.x).detach()
        parts = self.growth.run.parts
        own = parts.orchestrator.services.donor.like(kernel, layer.place)
        decision = Decision(1, 0, "graft", site, units, "random", "asked", 1.0, None)
        self.why = parts.committer.commit(kernel, own, decision, 0)
        self.growth.run.morphable.release(site)
        self.grown = self.net(self.x).detach()

    def step(self) -> None:
        loss = loss_fn(self.net, batch(self.kind))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


@pytest.fixture(params=PLACES, ids=[f"{kind}-{site}" for kind, site in PLACES])
def kept(request: pytest.FixtureRequest) -> Kept:
    return Kept(*request.param)


def test_what_stays_equals_the_branch_and_learns(kept: Kept) -> None:
    assert kept.why == ""
    assert not torch.equal(kept.branch, kept.before)
    torch.testing.assert_close(kept.grown, kept.branch, rtol=0, atol=3e-6 * float(kept.branch.abs().max()))
    (event,) = [e for e in kept.events if e.kind == "grafted"]
    added = set(dict(kept.net.named_parameters())) - set(dict(kept.plain.named_parameters()))
    assert (event.data["how"] == "merged") == (not added)
    owned = {id(p) for group in kept.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in owned for p in kept.net.parameters())
    assert len(kept.optimizer.param_groups) == 1
    before = {name: p.detach().clone() for name, p in kept.net.named_parameters()}
    kept.net.train()
    kept.step()
    kept.step()
    assert all(not torch.equal(before[name], p) for name, p in kept.net.named_parameters() if name in added)
    assert [name for name in kept.net.state_dict() if name not in added] == list(kept.plain.state_dict())


def test_it_is_saved_rebuilt_without_esper_copied_and_exported(kept: Kept, tmp_path: Path) -> None:
    kept.step()
    net = kept.growth.finish().eval()
    expected = net(kept.x).detach()
    folder = kept.growth.save(tmp_path / "grown")
    assert torch.equal(esper.load_into(HOSTS[kept.kind](), folder).eval()(kept.x), expected)
    torch.testing.assert_close(copy.deepcopy(net)(kept.x), expected, rtol=0, atol=0)
    exported = torch.export.export(net, (kept.x,)).module()(kept.x)
    torch.testing.assert_close(exported, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    torch.save((kept.x, expected), tmp_path / "expected.pt")
    script = "\n".join(
        [
            "import sys, torch", "sys.modules['esper'] = None", f"sys.path[:0] = [{str(folder)!r}]",
            "from tests.integration.grafting_hosts import HOSTS", "import rebuild",
            f"x, expected = torch.load({str(tmp_path / 'expected.pt')!r})",
            f"y = rebuild.load(HOSTS[{kept.kind!r}]()).eval()(x).detach()",
            "print(float((y - expected).abs().max()))",
        ]
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-6


def test_several_branches_at_one_place_and_their_undoing() -> None:
    kept = Kept("sequences", "blocks.0+bottleneck_adapter")
    assert [type(plan) for plan in kept.growth.plans] == [GraftPlan]
    assert [type(module) for module in kept.net.modules()] == [
        type(module) for module in kept.plain.modules()
    ]
    again = kept.growth.run.morphable.places["blocks.0+bottleneck_adapter"].kernel(4)
    plan = kept.growth.run.parts.committer.plan_for(
        kept.growth.run.morphable.places["blocks.0+bottleneck_adapter"],
        4,  # type: ignore[arg-type]
    )
    with pytest.raises(SurgeryError, match="differ from the branch"):
        kept.growth.run.parts.committer.attach(plan, again, None, torch.randn(24, 5, 8))  # type: ignore[arg-type]
    assert torch.equal(kept.net(kept.x), kept.grown)
    own = [name for name in kept.net.state_dict() if "grown_" in name]
    assert own
    assert all(name.startswith("blocks.0.grown_0_bottleneck_adapter_") for name in own)


def test_averages_and_recomputed_blocks_follow() -> None:
    net = Sequences(recompute=True)
    average = AveragedModel(net)
    kept = Kept("sequences", "blocks.0+bottleneck_adapter", net, ema=(average,))
    assert kept.why == ""
    average.update_parameters(net)
    assert torch.equal(average.module.eval()(kept.x), kept.net(kept.x))
    kept.net.train()
    kept.step()
    average.update_parameters(kept.net)
    assert not torch.equal(average.module(kept.x), kept.grown)


def test_a_model_with_an_attribute_of_that_name_is_left_as_it_was() -> None:
    net = Sequences()
    net.blocks[0].grown_0_bottleneck_adapter_down_weight = 3  # type: ignore[assignment]
    kept = Kept("sequences", "blocks.0+bottleneck_adapter", net)
    assert "has an attribute 'grown_0_bottleneck_adapter_down_weight' of its own" in kept.why
    assert not any(is_open(module) for module in net.modules())
    assert torch.equal(kept.grown, kept.before)


@pytest.mark.parametrize("stop", [3, 30, 55])
def test_a_run_that_grows_blocks_resumes_bit_for_bit(stop: int) -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer, esper.Growth]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4))  # two exclusive-ors: no linear layer can tell them
        optimizer = torch.optim.Adam(net.parameters(), 0.01)
        config = {
            "blueprints": ["residual_mlp"], "schedule": {"warmup": 0.05}, "gate": {"false_keep": 0.99},
            "race": {"steps": 20, "candidates": 3}, "budget": {"growth_events": 1, "growth_factor": 200},
        }  # fmt: skip
        growth = esper.grow(
            net, optimizer, loss_fn, probe=[data(-1), data(-2), data(-3)], steps=80, config=config
        )
        return net, optimizer, growth

    def data(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step + 10)
        x = torch.randn(64, 4, generator=generator)
        return x, (x[:, 0] * x[:, 1] > 0) + 2 * (x[:, 2] * x[:, 3] > 0)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, growth: esper.Growth, steps: range) -> None:
        for step in steps:
            loss = loss_fn(net, data(step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            growth.step(data(step), loss)

    net, optimizer, growth = begun()
    train(net, optimizer, growth, range(stop))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), growth.state_dict()))
    train(net, optimizer, growth, range(stop, 80))
    assert growth.plans, "the run must have grown a branch to say anything"
    other, its_optimizer, its_growth = begun()
    its_growth.load_state_dict(saved[2])
    other.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    train(other, its_optimizer, its_growth, range(stop, 80))
    mine, theirs = net.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    ("kind", "site"), [PLACES[0], PLACES[3], PLACES[6]], ids=["vector", "image", "sequence"]
)
def test_it_is_exported_to_onnx(kind: str, site: str, tmp_path: Path) -> None:
    net = Kept(kind, site).growth.finish().eval()
    x = batch(kind)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about itself
        torch.onnx.export(net, (x,), tmp_path / "grown.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "grown.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = net(x).detach()
    assert float((torch.tensor(y) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_an_exposed_kernels_vitals_are_sampled_smoothed_and_told() -> None:
    kept = Kept("vectors", "0+residual_mlp")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    events: list[Event] = []
    x = torch.randn(256, 4)
    data = x, (x[:, 0] * x[:, 1] > 0) + 2 * (x[:, 2] * x[:, 3] > 0)
    config = {
        "blueprints": ["residual_mlp"], "gate": {"false_keep": 0.99}, "race": {"steps": 20},
        "blend": {"ramp": 10}, "telemetry": {"sampling": 3}, "budget": {"growth_factor": 200},
    }  # fmt: skip
    growth = esper.grow(
        net, optimizer, loss_fn, probe=[data], steps=80, config=config, on_event=events.append
    )
    for _ in range(80):
        loss = loss_fn(net, data)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step(data, loss)
    told = [event for event in events if event.kind == "vitals"]
    assert told
    assert all(event.step % 3 == 0 for event in told)
    last = told[-1].data
    assert 0 < last["score"] <= 1
    assert last["variance"] > 0
    assert last["gradient"] > 0
    assert "latency" not in last  # the same seed tells the same events
    assert 0 <= last["dead"] < 1
    assert not any(event.kind == "vitals" for event in kept.events)
