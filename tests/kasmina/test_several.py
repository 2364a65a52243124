"""Several seeds awake at once: at places of their own, in slots of one place, through a real run."""

from __future__ import annotations

import copy
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.contracts import Stage
from esper.errors import ConfigError, StateError
from esper.kasmina.race.trial import Exposed, Training
from esper.surgery.isolation.acting import own_state
from tests.kasmina.hosts import frozen, same
from tests.unseen import noting

STEPS = 160
FAST = {
    "schedule": {"warmup": 0.01, "embargo": 0.02, "concurrent": 3, "plateau": False},
    "race": {"steps": 8, "candidates": 4},
    "blend": {"ramp": 2, "stabilise": 2, "evaluate": 3},
    "gate": {"looks": 12},
}


class Wide(nn.Module):
    """Three bottlenecks side by side, none of which touches another's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.BatchNorm1d(2), nn.Linear(2, 8)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(0)


class Chain(nn.Module):
    """Two pairs that share a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 2), nn.Linear(2, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


def pair(examples: int, order: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, 8, generator=order)
    return x, torch.relu(x) * 2 - x.roll(1, 1).abs()


def loss_fn(net: nn.Module, batch: Any) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


class Run:
    """A loop whose data come from one stream."""

    def __init__(self, kind: type[nn.Module] = Wide, grow: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.interrupted = 0  # call of the loss by growth in which Ctrl-C comes
        self.note, noted = noting()
        self.called = lambda: len(noted)
        self.net = kind()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.order = torch.Generator().manual_seed(1)
        self.events: list[Any] = []
        self.growth: Any = None
        if grow:
            given = {"config": FAST, "budget": {"growth_factor": 8.0}, "growth": "incubate", **options}
            probe = [pair(256, torch.Generator().manual_seed(9))]
            told = self.events.append
            self.growth = esper.grow(
                self.net, self.optimizer, self.loss, probe=probe, steps=STEPS, on_event=told, **given
            )
        torch.manual_seed(2)

    def loss(self, net: nn.Module, batch: Any) -> Tensor:
        """The user's loss, in which Ctrl-C may come."""
        self.note(None)
        if self.called() == self.interrupted:
            signal.raise_signal(signal.SIGINT)
        return loss_fn(net, batch)

    @property
    def trials(self) -> dict[Any, Any]:
        return self.growth.run.orchestrator.trials

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            batch = pair(32, self.order)
            loss = loss_fn(self.net, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.growth is not None:
                self.growth.step(batch, loss)

    def wake(self, *sites: str) -> Run:
        """Ask for seeds at sites, one a step."""
        for site in sites:
            self.growth.grow_now(site)
            self.step()
        assert [origin.site for origin in (t.origin for t in self.trials.values())] == list(sites)
        return self

    def bits(self) -> list[Any]:
        return frozen([self.net.state_dict(), self.optimizer.state_dict()["state"]])

    def told(self, kind: str) -> list[Any]:
        return [event.data for event in self.events if event.kind == kind]


SITES = [f"parts.{part}.0>parts.{part}.3" for part in range(3)]


def sites_of(run: Run) -> list[str]:
    return list(run.growth.run.morphable.places)


@pytest.mark.parametrize("count", [2, 3])
def test_the_host_cannot_tell_several_seeds_that_train(count: int) -> None:
    run, plain = Run(), Run(grow=False)
    run.wake(*sites_of(run)[:count])
    run.step(5)
    plain.step(count + 5)
    assert all(isinstance(trial, Training) for trial in run.trials.values())
    assert same(run.bits(), plain.bits())


def test_each_is_judged_and_kept_on_its_own_and_the_optimizer_follows() -> None:
    run = Run()
    sites = sites_of(run)
    run.wake(*sites)
    together = 0
    while run.trials:
        run.step()
        together = max(together, len(run.growth.run.orchestrator.exposed))
    assert together >= 2, "several were in the host's output at once"
    outcomes = {outcome["site"]: outcome for outcome in run.told("outcome")[:3]}
    gates = {gate["site"]: gate["passed"] for gate in run.told("gate")[:3]}
    assert set(outcomes) == set(sites)
    assert sum(one["kept"] for one in outcomes.values()) >= 2
    for site, one in outcomes.items():
        assert gates[site] or not one["kept"]
    run.growth.pause()
    run.step(3)
    assert all(state["exp_avg"].shape == p.shape for p, state in run.optimizer.state.items())
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in run.net.parameters()
    }
    added = sum(one["parameters"] for one in run.told("outcome"))
    assert added == sum(p.numel() for p in run.net.parameters()) - sum(p.numel() for p in Wide().parameters())
    cost = sum(one["cost_flops"] for one in run.told("outcome"))
    assert 0 < cost <= run.growth.run.cost.growth_flops, "no work is paid for twice"


@pytest.mark.parametrize("after", [4, 10, 11, 13])
def test_a_run_with_several_awake_goes_on_in_a_fresh_process(after: int) -> None:
    whole = Run().wake(*SITES)
    whole.step(after)
    assert len(whole.trials) > 1
    saved = copy.deepcopy(whole.growth.state_dict())
    model = frozen(own_state(whole.net))
    optimizer = copy.deepcopy(whole.optimizer.state_dict())
    order, torch_state = whole.order.get_state(), torch.get_rng_state()
    again = Run()
    again.growth.load_state_dict(saved)
    again.net.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.order.set_state(order)
    torch.set_rng_state(torch_state)
    assert list(again.trials) == list(whole.trials)
    assert [type(t) for t in again.trials.values()] == [type(t) for t in whole.trials.values()]
    for run in (whole, again):
        run.step(40)
        run.growth.finish()
    assert same(whole.bits(), again.bits())


def test_what_stands_at_a_place_that_another_growth_changed_is_culled_with_the_reason() -> None:
    run = Run(Chain, config={**FAST, "gate": {"looks": 2, "false_keep": 0.9}})
    first, second = sites_of(run)
    run.growth.pause()
    run.step(60)  # a host that has learned what it can
    run.growth.resume()
    run.wake(first, second)
    while run.trials:
        run.step()
    kept, culled = run.told("outcome")
    assert (kept["kept"], culled["kept"]) == (True, False)
    assert f"{kept['site']} has grown, and {culled['site']} is another place by now" == culled["reason"]
    assert [e for e in run.told("stage") if e["target"] == "CULLED"][-1]["reason"] == culled["reason"]
    run.growth.finish()
    assert torch.isfinite(run.net(torch.zeros(1, 8))).all()


def test_a_second_seed_of_one_site_wakes_in_another_slot_and_waits_while_the_first_is_judged() -> None:
    run = Run()
    site = sites_of(run)[0]
    run.wake(site, site)
    assert list(run.trials) == [(site, 0), (site, 1)]
    orchestrator = run.growth.run.orchestrator
    while not orchestrator.exposed:
        run.step()
    run.growth.pause()
    step = run.growth.steps
    while orchestrator.exposed:
        (exposed,) = orchestrator.exposed
        assert exposed.origin.slot == 0
        assert isinstance(run.trials[site, 1], Training)
        run.step()
    assert run.growth.steps > step + 4
    one = run.told("outcome")[0]
    other = run.told("outcome")[1:2]
    assert not one["kept"] or not other[0]["kept"], "what it stood at is wider by now"


def test_budgets_count_all_that_is_awake() -> None:
    run = Run(budget={"growth_factor": 8.0, "growth_events": 2})
    assert run.growth.run.remaining_budget().events == 2
    run.wake(*SITES[:2])
    assert run.growth.run.remaining_budget().events == 0
    run.growth.grow_now(SITES[2])
    run.step()
    assert len(run.trials) == 2, "two awake are all that may be kept"
    grown = sum(
        t.origin.layer.place.site.unit_parameters * t.origin.decision.width for t in run.trials.values()
    )
    assert run.growth.run.promised()[0] == grown


def test_without_the_setting_one_seed_is_awake_at_a_time() -> None:
    schedule = {**FAST["schedule"], "concurrent": 1}
    run = Run(config={**FAST, "schedule": schedule})
    run.growth.grow_now(SITES[0])
    run.step()
    run.growth.grow_now(SITES[1])
    run.step(3)
    assert [key[0] for key in run.trials] == [SITES[0]]
    assert run.growth.state_dict()["version"] == 2


def test_an_error_in_one_seeds_work_ends_that_seed_alone() -> None:
    run = Run().wake(*SITES[:2])
    first, second = run.trials.values()
    first.race.starts = ()  # its next lesson cannot be taken
    first.race.parameters = {}
    run.step()
    assert [t.origin for t in run.trials.values()] == [second.origin]
    assert run.told("outcome")[0]["site"] == SITES[0]


@pytest.mark.parametrize("call", [1, 10, 25, 37])
def test_ctrl_c_in_the_work_for_one_leaves_the_others_and_the_run_whole(call: int) -> None:
    run = Run().wake(*SITES)
    run.step(7)
    run.interrupted = run.called() + call
    with pytest.raises(KeyboardInterrupt):
        run.step(40)
    for trial in run.trials.values():
        layer = trial.origin.layer
        assert layer.shown is None
        assert layer.exposed == (float(run.growth.run.morphable.layout.alpha[trial.origin.seed]) > 0)
    run.step(30)
    net = run.growth.finish()
    assert not any("_esper_seam" in vars(module) for module in net.modules())
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in net.parameters()
    }
    assert not run.told("fault")


def test_a_save_says_that_it_holds_one_exposed_seed_and_the_run_goes_on(tmp_path: Any) -> None:
    run = Run().wake(*SITES)
    while len([t for t in run.growth.run.orchestrator.exposed if t.origin.layer.exposed]) < 2:
        run.step()
        assert run.trials
    with pytest.raises(StateError, match="a save holds one seed that is being let in"):
        run.growth.save(tmp_path / "model")
    run.step(2)
    assert all(isinstance(t, Exposed | Training) for t in run.trials.values())
    exits = [t.origin.layer.place.site.exit for t in run.growth.run.orchestrator.exposed]
    assert len(set(exits)) == len(exits)
    assert run.growth.run.morphable.layout.stage_of(0) is not Stage.DORMANT


def test_the_governor_examines_one_seed_and_says_so() -> None:
    with pytest.raises(ConfigError, match="one seed at a time"):
        Run(config={**FAST, "governor": {"enabled": True}})
