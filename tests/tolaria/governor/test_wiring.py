"""A run of ``esper.grow`` is governed by itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.checkpoint.format.manifest import packed
from esper.contracts import Event
from esper.errors import LossError
from tests.tolaria.test_conductor import clusters, loss_fn


class Plain:
    """An ordinary loop with three lines of Esper."""

    def __init__(self, recipe: str = "early", **governor: Any) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 8))
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.02)
        self.events: list[Event] = []
        config = {"governor": {"enabled": True, "every": 10, **governor}}
        given = {"probe": [clusters(10_000, 256)], "steps": 160, "budget": {"growth_factor": 8.0}}
        given["growth"] = recipe
        self.growth = esper.grow(
            self.net, self.optimizer, loss_fn, config=config, on_event=self.events.append, **given
        )

    def train(self, steps: int, spoil: float = 1.0) -> None:
        for _ in range(steps):
            batch = clusters(self.growth.run.clock.count)
            loss = loss_fn(self.net, batch) * spoil
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.growth.step(batch, loss)


def test_a_lost_loss_costs_steps_and_not_the_run() -> None:
    run = Plain(calm=5)
    run.growth.pause()
    run.train(20)
    at = copy.deepcopy(run.net.state_dict())
    run.train(5)
    run.train(1, math.nan)
    assert all(torch.equal(value, at[name]) for name, value in run.net.state_dict().items())
    assert [e.data["lost"] for e in run.events if e.kind == "rolled_back"] == [6]
    run.growth.resume()
    run.train(134)
    assert run.growth.plans
    run.growth.finish()
    assert not run.optimizer._optimizer_step_pre_hooks


def test_without_a_governor_it_raises_as_before() -> None:
    run = Plain(enabled=False)
    with pytest.raises(LossError, match="the loss is nan"):
        run.train(1, math.nan)


def test_what_is_announced_is_no_alarm() -> None:
    run = Plain(spike=("stop",))
    run.growth.pause()
    run.train(60)
    run.growth.expect("louder")
    run.train(3, 1e3)
    alarms = [e.data for e in run.events if e.kind == "alarm"]
    assert alarms
    assert {alarm["expected"] for alarm in alarms} == {"louder"}


def test_the_governor_goes_on_in_another_process() -> None:
    run, other = Plain(), Plain()
    run.train(25)
    state = run.growth.state_dict()
    other.growth.load_state_dict(copy.deepcopy(state))
    one, theirs = packed(state["governor"])
    two, ours = packed(other.growth.state_dict()["governor"])
    assert one == two
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
