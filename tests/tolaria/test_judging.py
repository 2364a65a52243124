"""An event at the boundary of what is worth it: kept, given more time, or taken back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam

import esper
from esper.contracts import Event
from esper.tolaria.growth.early.judged import Judged
from tests.tolaria.test_takeback import STEPS, clusters, loss_fn, mlp


class Run:
    """A run up to its first event that grows, which is open."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = mlp()
        self.size = self.parameters
        self.optimizer = Adam(self.net.parameters(), lr=0.01)
        self.events: list[Event] = []
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            probe=[clusters(10_000, 256)],
            steps=STEPS,
            growth="early",
            on_event=self.events.append,
            config={"early": {"enough": 0.0, "reopen": "no"}},
            **options,
        )
        early = self.growth.loop.early
        assert early is not None
        self.early, self.now = early, 0
        while early.open is None:
            self.step()

    def step(self) -> None:
        batch = clusters(self.now)
        self.now += 1
        assert self.now < STEPS
        loss = loss_fn(self.net, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.growth.step(batch, loss)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [dict(event.data) for event in self.events if event.kind == kind]

    def lost(self) -> float:
        """What the probe loses now."""
        self.net.eval()
        with torch.no_grad():
            found = float(loss_fn(self.net, clusters(10_000, 256)))
        self.net.train()
        return found

    def open(self, held_out: float, later: int = 0) -> Judged:
        """Pretend that it lost this much before, and that so many steps are left until it is judged."""
        judged = self.early.open
        assert judged is not None
        judged.held_out, judged.until = held_out, self.growth.steps + later
        return judged


def test_what_has_won_is_kept_and_pays_for_what_follows() -> None:
    run = Run()
    judged, points = run.open(1e9), len(run.early.points)
    due = list(run.early.timetable.due)
    assert due
    kept, grown = run.growth.events_kept, run.parameters
    assert run.early.judging.judge() is True
    assert run.early.open is None
    assert judged.record.verdict == "kept"
    assert judged.record.reason == f"held-out loss 1e+09 → {run.lost():.4g}"
    assert run.early.spending.paid is True
    assert (run.growth.events_kept, run.parameters) == (kept, grown)
    assert len(run.early.points) == points + 1
    assert run.early.points[-1].held_out == pytest.approx(run.lost())
    outcomes = run.told("outcome")
    assert len(outcomes) == len(judged.decisions) > 0
    assert all(one["kept"] and one["reason"] == judged.record.reason for one in outcomes)
    assert not run.told("taken_back")
    assert run.early.timetable.due == due


@pytest.mark.parametrize(("events", "asked"), [(9, True), (2, True), (1, False)])
def test_the_last_event_that_has_won_asks_for_another_where_there_is_room(events: int, asked: bool) -> None:
    run = Run(budget={"growth_events": events})
    run.open(1e9)
    run.early.timetable.due = []
    assert run.early.judging.judge()
    assert run.early.timetable.due == ([run.growth.steps + 1] if asked else [])


def test_what_has_not_won_is_given_the_same_time_again_once() -> None:
    run = Run()
    before = run.growth.steps
    for _ in range(4):
        run.step()
    judged = run.open(-1.0)
    assert judged.before.step == before
    assert run.early.judging.judge() is False
    assert run.early.open is judged
    assert (judged.extended, judged.until) == (True, before + 8)
    assert judged.record.verdict == "open"
    assert not run.early.spending.paid
    judged.until = run.growth.steps
    assert run.early.judging.judge() is True
    assert run.early.open is None
    assert judged.record.verdict == "taken back"
    assert judged.record.reason.startswith("held-out loss -1 → ")
    assert judged.record.reason.endswith("; 1% less was needed")
    assert not run.early.spending.paid
    (told,) = run.told("taken_back")
    assert (told["to"], told["lost"], told["before"], told["parameters"]) == (before, 4, -1.0, run.size)
    assert told["now"] > 0
    assert run.parameters == run.size
    assert run.growth.events_kept == 0
    outcomes = run.told("outcome")
    assert len(outcomes) == len(judged.decisions)
    assert not any(one["kept"] for one in outcomes)
    assert all(one["reason"] == outcomes[0]["reason"] for one in outcomes)
    assert outcomes[0]["reason"].startswith("held-out loss -1 → ")
    run.step()  # and it trains on


@pytest.mark.parametrize("extended", [False, True])
def test_before_its_time_only_what_has_won_is_decided(extended: bool) -> None:
    run = Run()
    judged = run.open(-1.0, later=7)
    judged.extended = extended
    until = judged.until
    assert run.early.judging.judge(early=True) is False
    assert run.early.open is judged
    assert (judged.extended, judged.until, judged.record.verdict) == (extended, until, "open")
    judged.held_out = run.lost() * 1.005  # fallen, not by a hundredth
    assert run.early.judging.judge(early=True) is False
    judged.held_out = run.lost() * 1.02
    assert run.early.judging.judge(early=True) is True
    assert judged.record.verdict == "kept"


@pytest.mark.parametrize(("later", "kept"), [(1, True), (0, False)])
def test_where_the_run_ends_first_it_is_enough_that_the_loss_has_fallen(later: int, kept: bool) -> None:
    run = Run()
    judged = run.open(0.0, later)
    judged.held_out = run.lost() * 1.005
    assert run.early.judging.judge() is kept
    assert (judged.record.verdict == "kept") is kept


@pytest.mark.parametrize("early", [True, False])
def test_what_cannot_be_paid_for_is_not_judged_and_stays(early: bool) -> None:
    run = Run(budget={"growth_flops": 10**12})
    judged, points = run.open(-1.0), len(run.early.points)
    run.growth.run.cost.grow(10**12)
    decided = not early
    assert run.early.judging.judge(early) is decided
    assert len(run.early.points) == points
    if early:
        assert run.early.open is judged
        assert judged.record.verdict == "open"
        return
    assert run.early.open is None
    assert judged.record.verdict == "kept"
    assert judged.record.reason.startswith("not judged: the budget is spent")
    assert all(one["kept"] for one in run.told("outcome"))
    assert not run.early.spending.paid


def test_what_the_user_has_replaced_is_not_overwritten() -> None:
    run = Run()
    judged = run.open(-1.0)
    judged.extended = True
    name = judged.decisions[0].site
    layer = int(name.split(">")[0])
    new = nn.Linear(run.net[layer].in_features, run.net[layer].out_features)
    run.net[layer] = new
    weight, kept = new.weight.detach().clone(), run.growth.events_kept
    assert run.early.judging.judge() is True
    assert judged.record.verdict == "kept"
    assert "; not taken back, for " in judged.record.reason
    assert torch.equal(new.weight, weight)
    assert run.growth.events_kept == kept
    assert not run.early.spending.paid
    assert not run.told("taken_back")
