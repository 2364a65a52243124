"""A trunk of several heads grows early: dict batches, dict outputs, and all that follows a widening."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.contracts import Event
from esper.kasmina.evidence.growth_cost import GrowthCost

STEPS = 400
Batch = dict[str, Tensor]


class Heads(nn.Module):
    """Which digit, and how much ink."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.t = nn.Sequential(nn.Linear(64, width), nn.ReLU())
        self.c, self.m = nn.Linear(width, 10), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.t(x)
        return {"digit": self.c(h), "ink": self.m(h)}


class Pictures(nn.Module):
    """A BatchNorm before the parting; one head is a convolution, one a linear layer behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.c, self.m = nn.Conv2d(2, 10, 4, stride=4), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.norm(self.stem(x.view(-1, 1, 8, 8))))
        return {"digit": self.c(h).mean((2, 3)), "ink": self.m(F.avg_pool2d(torch.tanh(h), 4).flatten(1))}


def part(first: int, last: int) -> Batch:
    digits = load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))[first:last]
    x = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    return {"x": x, "digit": torch.tensor(digits.target)[order], "ink": x.mean(1, keepdim=True)}


TRAIN, HELD, TEST = part(0, 1200), part(1200, 1500), part(1500, 1797)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    said = model(batch["x"])
    return F.cross_entropy(said["digit"], batch["digit"]) + F.mse_loss(said["ink"], batch["ink"])


class Run:
    """A run with an average of its weights and a schedule."""

    def __init__(
        self, net: nn.Module | None = None, seed: int = 0, data: Batch = TRAIN, **options: Any
    ) -> None:
        torch.manual_seed(seed)
        self.data = data
        self.net = Heads() if net is None else net
        self.optimizer = Adam(self.net.parameters(), 0.005)
        self.scheduler = CosineAnnealingLR(self.optimizer, STEPS)
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.events: list[Event] = []
        self.now, self.seed = 0, seed
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            steps=STEPS,
            schedulers=[self.scheduler],
            ema=[self.average],
            on_event=self.events.append,
            **{"probe": [HELD], **options},
        )

    def learn(self) -> tuple[Batch, Tensor]:
        """Do what a user does in one step, but for the line that grows."""
        generator = torch.Generator().manual_seed(1000 * self.seed + self.now)
        which = torch.randint(1200, (64,), generator=generator)
        batch = {name: tensor[which] for name, tensor in self.data.items()}
        self.now += 1
        loss = loss_fn(self.net, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.average.update_parameters(self.net)
        return batch, loss

    def step(self) -> None:
        self.growth.step(*self.learn())

    def to(self, step: int) -> Run:
        while self.now < step:
            self.step()
        return self

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def state(self) -> list[Any]:
        parts = self.growth, self.net, self.optimizer, self.scheduler, self.average
        return copy.deepcopy([part.state_dict() for part in parts])


def accuracy(net: nn.Module) -> float:
    with torch.no_grad():
        return float((net(TEST["x"])["digit"].argmax(1) == TEST["digit"]).float().mean())


@pytest.mark.parametrize("seed", range(3))
def test_a_trunk_of_two_heads_grows_to_what_the_full_size_reaches(seed: int) -> None:
    run = Run(seed=seed).to(STEPS)
    assert run.growth.run.recipe == "early", "what auto chooses"
    run.growth.finish()
    assert {event.data["site"] for event in run.told("widened")} == {"t.0>c+m"}
    assert min(event.step for event in run.told("widened")) < STEPS / 4
    assert accuracy(run.net) >= 0.93
    net = run.net
    assert isinstance(net, Heads)
    assert net.t[0].out_features == net.c.in_features == net.m.in_features >= 16
    assert "t.0>c+m" in str(run.growth)
    assert all(one.site == "t.0>c+m" for event in run.growth.report().events for one in event.looked)
    averaged = [p.shape for p in run.average.module.parameters()]
    assert averaged == [p.shape for p in run.net.parameters()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", [Heads, Pictures])
def test_nothing_the_model_says_changes_at_the_moment_of_an_event(make: Any, training: bool) -> None:
    torch.manual_seed(0)
    run = Run(make(), config={"early": {"reopen": "no", "enough": 0.0}})
    early = run.growth.loop.early
    assert early is not None
    before: dict[str, Tensor] = {}
    while run.now < STEPS // 2 and early.open is None:
        given = run.learn()
        with torch.no_grad():
            twin = copy.deepcopy(run.net).train(training)
            before = twin(HELD["x"])
        run.growth.step(*given)
    assert early.open is not None, "nothing grew"
    with torch.no_grad():
        after = copy.deepcopy(run.net).train(training)(HELD["x"])
    for name, said in before.items():
        assert torch.allclose(said, after[name], rtol=1e-5, atol=1e-5), name


class Beside(nn.Module):
    """Other places at what a fork widens: its consumers are heads of attention, and a gated pair."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        if not last:
            self.a = nn.Linear(16, 8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.b, self.gate, self.up, self.down = (
            nn.Linear(8, 6),
            nn.Linear(6, 5),
            nn.Linear(6, 5),
            nn.Linear(5, 10),
        )
        if last:
            self.a = nn.Linear(16, 8)
        self.ink = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.a(x.view(len(x), 4, 16)))
        q, k, v = (part(h).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.q, self.k, self.v))
        h = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)).mean(1)
        g = torch.tanh(self.b(h))
        return {"digit": self.down(F.silu(self.gate(g)) * self.up(g)), "ink": self.ink(h)}


@pytest.mark.parametrize("last", [False, True], ids=["listed first", "listed last"])
def test_a_fork_is_widened_together_with_the_places_behind_it_and_put_back(last: bool) -> None:
    torch.manual_seed(0)
    run = Run(Beside(last))
    early = run.growth.loop.early
    assert early is not None
    places = run.growth.run.morphable.pairs
    assert {"a>q+k+v", "q>out", "out>b+ink", "b>gate+up", "gate*up>down"} == set(places)
    before, parameters = early.insertion.remember(0), run.growth.run.morphable.parameter_count()
    said, state = run.net(HELD["x"]), copy.deepcopy(run.net.state_dict())
    units = {name: 2 * place.site.granularity for name, place in places.items()}
    told, _ = GrowthCost(run.net, places)(units)
    kernels = {name: place.kernel(units[name]) for name, place in places.items()}
    assert early.insertion.widen(kernels, units, before, {}) == ""
    assert run.growth.run.morphable.parameter_count() == parameters + told
    for name, now in run.net(HELD["x"]).items():
        assert torch.allclose(said[name], now, rtol=1e-4, atol=1e-5), name
    assert run.growth.run.morphable.pairs["a>q+k+v"].site.width == 10
    loss_fn(run.net, HELD).backward()
    early.insertion.restore(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in run.net.state_dict().items())


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], dict[int, list[Any]], list[int]]:
    """A run without a break: its weights, a state at every 100th step and one right after it has grown."""
    torch.manual_seed(0)
    run = Run(Pictures(), config={"early": {"enough": 0.0}})
    early, states, opened = run.growth.loop.early, dict[int, list[Any]](), list[int]()
    assert early is not None
    while run.now < STEPS:
        if run.now % 100 == 0 or (early.open is not None and not opened):
            states[run.now] = run.state()
            opened += [run.now] if early.open is not None else []
        run.step()
    run.growth.finish()
    return {n: t.clone() for n, t in run.average.state_dict().items()}, states, opened


def test_a_run_that_was_cut_goes_on_bit_for_bit(whole: Any, tmp_path: Path) -> None:
    reference, states, opened = whole
    assert opened, "no state was taken while an event was open"
    for cut, state in states.items():
        torch.save(state, tmp_path / "state.pt")
        growth, net, optimizer, scheduler, average = torch.load(tmp_path / "state.pt", weights_only=True)
        run = Run(Pictures(), config={"early": {"enough": 0.0}})
        run.growth.load_state_dict(growth)
        run.net.load_state_dict(net)
        run.optimizer.load_state_dict(optimizer)
        run.scheduler.load_state_dict(scheduler)
        run.average.load_state_dict(average)
        run.now = cut
        run.to(STEPS)
        run.growth.finish()
        assert reference.keys() == run.average.state_dict().keys()
        for name, tensor in run.average.state_dict().items():
            assert torch.equal(reference[name], tensor), (cut, name)


def test_a_grown_model_is_saved_and_rebuilt_with_torch_alone(tmp_path: Path) -> None:
    run = Run().to(STEPS // 2)
    run.growth.finish()
    assert run.growth.plans
    said = run.net(TEST["x"])["ink"].detach()
    folder = run.growth.save(tmp_path / "saved")
    assert torch.equal(esper.load_into(Heads(), folder)(TEST["x"])["ink"], said)
    assert isinstance(run.net, Heads)
    width = run.net.c.in_features
    script = f"""
import sys; sys.path.insert(0, {str(folder)!r})
from torch import nn
from rebuild import load
class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Sequential(nn.Linear(64, 2), nn.ReLU())
        self.c, self.m = nn.Linear(2, 10), nn.Linear(2, 1)
net = load(Heads())
assert "esper" not in sys.modules
assert net.t[0].out_features == net.c.in_features == net.m.in_features == {width}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_noise_grows_nothing() -> None:
    """Labels that have nothing to do with the inputs."""
    torch.manual_seed(0)
    data, held = (
        {**part, "digit": torch.randint(10, (n,)), "ink": torch.randn(n, 1)}
        for part, n in ((TRAIN, 1200), (HELD, 300))
    )
    run = Run(data=data, probe=[held]).to(STEPS)
    run.growth.finish()
    assert not run.told("widened")


def test_a_head_replaced_by_hand_is_named_and_left_alone() -> None:
    run = Run().to(20)
    assert isinstance(run.net, Heads)
    run.net.m = nn.Linear(run.net.m.in_features, 1)
    run.to(STEPS // 2)
    run.growth.finish()
    early = run.growth.loop.early
    assert early is not None
    reasons = [one.reason for record in early.records for one in record.looked]
    assert any("m was replaced or removed since esper.grow" in reason for reason in reasons)


def test_a_race_leaves_it_alone_and_says_why() -> None:
    run = Run(growth="incubate", config={"blueprints": ["auto"]})
    assert not run.growth.run.morphable.pairs
    (start,) = run.told("run_started")
    told = dict(start.data["refused"])
    assert "has 2 consumers (c, m)" in told["t.0"]
    assert "growth='early' can widen it" in told["t.0"]
    run.growth.finish()


def test_a_frozen_host_is_raced_for_without_its_forks() -> None:
    net = Heads()
    net.t[0].requires_grad_(False)
    run = Run(net)
    assert run.growth.run.recipe == "incubate"
    assert not run.growth.run.morphable.pairs
    run.growth.finish()
