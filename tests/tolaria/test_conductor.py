"""What a user may ask of a run in mid-course, and what the run tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.contracts import Event
from esper.errors import StateError

STEPS, CLASSES = 160, 8


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(CLASSES, 1), nn.Tanh(), nn.Linear(1, CLASSES))


def clusters(seed: int, examples: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (examples,), generator=generator)
    return 2 * torch.eye(CLASSES)[label] + 0.3 * torch.randn(examples, CLASSES, generator=generator), label


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Run:
    """A net on its way, with all that it told."""

    def __init__(self, **options: Any) -> None:
        self.net = make_net()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        self.events: list[Event] = []
        given = {"growth": "incubate", "steps": STEPS, "budget": {"growth_factor": 8.0}, **options}
        probe = [clusters(10_000, 256)]
        self.growth = esper.grow(
            self.net, self.optimizer, loss_fn, probe=probe, on_event=self.events.append, **given
        )

    def train(self, first: int, last: int, until: Callable[[Run], bool] = lambda run: False) -> int:
        """Train over a range of steps; returns the step behind the last one done."""
        for step in range(first, last):
            batch = clusters(step)
            loss = loss_fn(self.net, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.growth.step(batch, loss)
            if until(self):
                return step + 1
        return last

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


def test_a_paused_run_decides_nothing_until_it_is_resumed() -> None:
    run = Run()
    run.growth.pause()
    run.train(0, STEPS // 2)
    assert not run.told("decision")
    run.growth.resume()
    run.train(STEPS // 2, STEPS)
    assert run.told("decision")[0].step > STEPS // 2


def test_growth_that_is_asked_for_comes_at_the_next_step_and_says_so() -> None:
    run = Run(steps=None)  # nothing is scheduled
    run.train(0, 5)
    assert not run.told("decision")
    run.growth.grow_now("0>2")
    run.train(5, 6)
    (decision,) = run.told("decision")
    assert (decision.step, decision.data["site"]) == (6, "0>2")
    assert decision.data["reason"].startswith("asked for")


def test_a_fallback_says_at_which_step_it_happened() -> None:
    events: list[Event] = []

    def unbatchable(model: nn.Module, batch: Any) -> Tensor:
        loss = loss_fn(model, batch)
        return loss if loss.detach().item() >= 0 else -loss

    net = make_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    growth = esper.grow(
        net,
        optimizer,
        unbatchable,
        probe=[clusters(1, 96)],
        steps=STEPS,
        budget={"growth_factor": 8.0},
        growth="incubate",
        on_event=events.append,
    )
    for step in range(STEPS // 2):
        batch = clusters(step)
        loss = unbatchable(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step(batch, loss)
    fell_back = [event for event in events if event.kind == "fallback"]
    gates = {event.step for event in events if event.kind == "gate"}
    evidence = [event.step for event in fell_back if event.data["what"] == "evidence"]
    assert evidence
    assert set(evidence) <= gates


def test_what_was_asked_for_is_remembered_across_processes() -> None:
    before, after = Run(steps=None), Run(steps=None)
    before.growth.pause()
    before.growth.grow_now("0>2")
    after.growth.load_state_dict(before.growth.state_dict())
    after.train(0, 3)
    assert not after.told("decision")  # still paused
    after.growth.resume()
    after.train(3, 4)
    assert after.told("decision")[0].data["reason"].startswith("asked for")


@pytest.mark.parametrize(
    "limit", [{"growth_flops": 1.0}, {"wall_seconds": 1e-6}, {"latency_ms": 1e-6}, {"growth_events": 0}]
)
def test_a_spent_budget_ends_growth(limit: dict[str, float]) -> None:
    run = Run(budget={"growth_factor": 8.0, **limit})
    run.growth.grow_now("0>2")
    run.train(0, 3)
    run.growth.grow_now("0>2")
    run.train(3, STEPS)
    run.growth.finish()
    # the first of the FLOPs and seconds are spent by the first look itself
    refused = [event.data for event in run.told("decision") if event.data["action"] == "nothing"]
    assert refused
    assert all("the budget is spent" in data["reason"] for data in refused)
    assert len(run.growth.plans) <= 1


def test_a_culled_site_cools_down_and_says_when_it_is_over() -> None:
    # nothing can gain a third of the loss at one look, so every winner is refused
    run = Run(config={"gate": {"min_gain": 1e6}, "schedule": {"embargo": 0.05}})
    run.train(0, STEPS)
    stages = [(event.data["source"], event.data["target"], event.step) for event in run.told("stage")]
    slept = [step for _, target, step in stages if target == "EMBARGOED"]
    woke = [step for source, target, step in stages if (source, target) == ("EMBARGOED", "DORMANT")]
    assert slept
    assert woke
    assert woke[0] - slept[0] == 8  # 0.05 of 160 steps
    assert all(event.data["site"] == "0>2" for event in run.told("stage"))


@pytest.mark.parametrize("asleep", [True, False])
def test_a_run_goes_on_in_a_fresh_process_as_if_it_had_never_stopped(asleep: bool) -> None:
    def stopping(run: Run) -> bool:
        awake = run.growth.run.orchestrator.oldest is not None
        return len(run.growth.plans) >= 1 and awake is not asleep

    whole = Run()
    whole.train(0, STEPS)
    whole.growth.finish()

    cut = Run()
    step = cut.train(0, STEPS, stopping)
    assert step < STEPS
    model, optimizer = cut.net.state_dict(), cut.optimizer.state_dict()
    state = cut.growth.state_dict()

    again = Run()
    again.growth.load_state_dict(state)
    again.net.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    assert [event.step for event in again.told("run_started")] == [0, step]
    assert again.told("run_started")[1].data["sites"][0]["width"] == again.net[0].out_features
    again.train(step, STEPS)
    assert again.growth.finish() is again.net
    assert again.growth.plans == whole.growth.plans
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name]), name
    assert again.growth.cost.growth_flops == whole.growth.cost.growth_flops


def test_states_that_do_not_fit_are_refused() -> None:
    state = Run().growth.state_dict()
    with pytest.raises(StateError, match=r"version 99; this Esper reads versions 2 and 3"):
        Run().growth.load_state_dict({**state, "version": 99})
    with pytest.raises(StateError, match=r"the state knows the site 'fc1>fc2', this model does not; .*0>2"):
        Run().growth.load_state_dict({**state, "sites": {"fc1>fc2": 3}})
    begun = Run()
    begun.train(0, 1)
    with pytest.raises(StateError, match=r"begun already; load the state right after esper.grow"):
        begun.growth.load_state_dict(state)
