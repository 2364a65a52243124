"""The governor of a run that grows: bad seeds are never kept, and the way back is bit for bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.contracts import Event, Stage
from esper.errors import LossError
from esper.kasmina.race.trial import Exposed, Training, Trial
from esper.tolaria.governor import GovernorHooks, Settings
from tests.tolaria.test_conductor import clusters, loss_fn

STEPS, CLASSES = 160, 8
LIVING = (Stage.GRAFTING, Stage.STABILISING, Stage.EVALUATING)


class Run:
    """A governed net on its way."""

    def __init__(self, seed: int = 0, **settings: Any) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(CLASSES, 2), nn.Tanh(), nn.Dropout(0.05), nn.Linear(2, CLASSES))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 50, 0.9)
        self.events: list[Event] = []
        self.step = 0
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            probe=[clusters(10_000 + seed, 256)],
            steps=STEPS,
            budget={"growth_factor": 8.0},
            growth="incubate",
            seed=seed,
            on_event=self.events.append,
        )
        self.watch = GovernorHooks(self.growth.run, Settings(**settings), stateful=[self.scheduler])
        self.growth.run.orchestrator.guard = self.watch

    def train(self, spoil: float = 1.0) -> str | None:
        """Train a step as the conductor does; returns what the governor did."""
        self.step += 1
        batch = clusters(self.step)
        loss = loss_fn(self.net, batch) * spoil
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        action = self.watch.step(float(loss.detach()), self.step)
        if action == "rollback":
            self.growth.run.steps = self.growth.run.clock.count
        else:
            self.growth.step(batch, loss)
        return action

    def until(self, *stages: Stage) -> Any:
        """Train until a seed is in one of the stages."""
        orchestrator = self.growth.run.orchestrator
        for _ in range(STEPS):
            self.train()
            if orchestrator.oldest is not None and orchestrator.stage_of(orchestrator.oldest) in stages:
                return orchestrator.oldest
        raise AssertionError(f"no seed came to {stages}")

    def alive(self, trial: Trial) -> bool:
        """Tell whether a trial is still under way."""
        oldest = self.growth.run.orchestrator.oldest
        return oldest is not None and oldest.origin is trial.origin

    def bits(self) -> list[Tensor]:
        state = self.optimizer.state_dict()["state"].values()
        held = [v for one in state for v in one.values()]
        return [t.detach().clone() for t in (*self.net.state_dict().values(), *held)]

    def alarms(self) -> list[Any]:
        return [e.data for e in self.events if e.kind == "alarm"]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_healthy_run_grows_without_an_alarm_and_as_it_does_unwatched() -> None:
    run = Run()
    for _ in range(STEPS):
        run.train()
    plain = Run()
    plain.watch.close()
    for step in range(1, STEPS + 1):
        batch = clusters(step)
        loss = loss_fn(plain.net, batch)
        plain.optimizer.zero_grad()
        loss.backward()
        plain.optimizer.step()
        plain.scheduler.step()
        plain.growth.step(batch, loss)
    assert run.growth.plans
    assert same(run.bits(), plain.bits())
    assert [a for a in run.alarms() if not a["expected"]] == []


def test_a_lost_loss_leads_back_bit_for_bit_and_tells_the_steps_lost() -> None:
    run = Run(every=10)
    run.growth.pause()
    while run.step < 20:
        run.train()
    at, rng = run.bits(), torch.get_rng_state()
    for _ in range(5):
        run.train()
    assert run.train(spoil=math.nan) == "rollback"
    assert same(run.bits(), at)
    assert torch.equal(torch.get_rng_state(), rng)
    assert run.scheduler.last_epoch == 20
    assert run.watch.governor.lost == 6
    (told,) = [e.data for e in run.events if e.kind == "rolled_back"]
    assert (told["to"], told["lost"]) == (20, 6)
    assert "6 steps are lost" in told["message"]
    assert run.train() is None


def test_no_way_leads_behind_a_widening() -> None:
    run = Run()
    while not run.growth.plans:
        run.train()
    (committed,) = [e.step for e in run.events if e.kind == "widened"]
    assert [s.step for s in run.watch.snapshots.ring] == [committed]
    width = run.net[0].out_features
    at = run.bits()
    assert run.train(spoil=math.nan) == "rollback"
    assert run.net[0].out_features == width
    assert same(run.bits(), at)


def test_a_run_that_cannot_be_helped_is_stopped_with_the_reason() -> None:
    run = Run(rollbacks=2)
    for _ in range(2):
        assert run.train(spoil=math.nan) == "rollback"
    with pytest.raises(LossError, match="stopped the run: nonfinite: loss is not finite at step 3"):
        run.train(spoil=math.nan)


def test_growth_is_held_and_goes_on_but_not_where_the_user_paused_it() -> None:
    run = Run(calm=5)
    run.train(spoil=math.nan)
    assert run.growth.run.paused
    for _ in range(5):
        run.train()
    assert not run.growth.run.paused
    run.growth.pause()
    run.train(spoil=math.nan)
    for _ in range(6):
        run.train()
    assert run.growth.run.paused


def test_a_watch_goes_on_from_its_state() -> None:
    run, other = Run(), Run()
    for _ in range(30):
        run.train()
    other.watch.load_state_dict(run.watch.state_dict())
    assert other.watch.state_dict() == run.watch.state_dict()


class Leaky(nn.Module):
    """A kernel that lets a gradient flow into the host past the seam."""

    def __init__(self, kernel: nn.Module, host: nn.Sequential) -> None:
        super().__init__()
        self.kernel, self.stolen = kernel, [host[3].weight]

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernel(x)
        return y + 10 * self.stolen[0].mean(1)


def spoil(trial: Exposed, fault: str, run: Run) -> None:
    """Make an exposed seed a bad one."""
    with torch.no_grad():
        for parameter in trial.kernel.parameters():
            if fault == "NaN":
                parameter.fill_(math.nan)
            elif fault == "explosion":
                parameter.mul_(1e6)
            elif fault == "dead":
                parameter.zero_()
            elif fault == "harmful":  # the host leans on it, and the loss is worse than without
                parameter.copy_(torch.randn_like(parameter) * 6)
    if fault == "leak":
        trial.origin.layer.kernel = Leaky(trial.kernel, run.net)  # type: ignore[assignment]


@pytest.mark.parametrize("value", [math.nan, 1e6, 0.0])
def test_a_candidate_that_is_bad_before_exposure_leaves_no_trace(value: float) -> None:
    run = Run()
    trial = run.until(Stage.TRAINING)
    while isinstance(run.growth.run.orchestrator.oldest, Training) and run.alive(trial):
        with torch.no_grad():
            for tensor in trial.race.parameters.values():
                tensor.fill_(value)
        run.train()
    (outcome,) = [e.data for e in run.events if e.kind == "outcome"]
    assert not outcome["kept"]
    plain = Run()
    plain.growth.pause()
    while plain.step < run.step:
        plain.train()
    assert same(run.bits(), plain.bits())


FAULTS = ("NaN", "explosion", "dead", "leak", "harmful")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(2))
def test_a_bad_seed_that_was_let_in_is_not_kept(fault: str, seed: int) -> None:
    bad_seed(fault, seed)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_of_a_hundred_bad_seeds_none_is_kept(fault: str) -> None:
    for seed in range(20):
        bad_seed(fault, seed)


def bad_seed(fault: str, seed: int) -> str:
    """Let a seed in, make it bad at its exposure, and follow it to its end."""
    run = Run(seed)
    trial = run.until(Stage.GRAFTING)
    before = run.watch.snapshots.ring[-1]
    spoil(trial, fault, run)
    plans, actions = len(run.growth.plans), []
    while run.alive(trial):
        actions.append(run.train())
        if "rollback" in actions:
            for name, tensor in run.watch.snapshots.tensors():
                assert torch.equal(tensor, before.tensors[name].copy)
            break
    outcome = [e.data for e in run.events if e.kind == "outcome"][-1]
    assert not outcome["kept"]
    assert len(run.growth.plans) == plans
    assert all(bool(torch.isfinite(p).all()) for p in run.net.parameters())
    return str(outcome["reason"])
