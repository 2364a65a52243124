"""A block that comes at the event at which its donor becomes wider: saved, loaded, averaged, repeated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.contracts import DeepenPlan, Event, WidenPlan
from tests.cases.loops import Task, cross_entropy

STEPS, WIDE = 150, 32
INNER = "blocks.0.up>blocks.0.down"


class Block(nn.Module):
    """Narrow inside a wide stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDE), nn.Linear(WIDE, 1), nn.Linear(1, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """One block, and room for more."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(10, WIDE), nn.Linear(WIDE, 10)
        self.blocks = nn.ModuleList([Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Run:
    """A run that is over."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.plain = copy.deepcopy(self.net)
        self.average = AveragedModel(self.net)
        self.events, self.draw = list[Event](), Task()
        self.growth = self.begin(self.net, self.average, on_event=self.events.append)
        optimizer = self.growth.run.parts.optimizers["optimizer"]
        for _ in range(STEPS):
            batch = self.draw()
            loss = cross_entropy(self.net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.average.update_parameters(self.net)
            self.growth.step(batch, loss)

    def begin(self, net: nn.Module, average: nn.Module, **given: Any) -> esper.Growth:
        return esper.grow(
            net, torch.optim.Adam(net.parameters(), 0.01), cross_entropy, probe=[self.draw(256)], steps=STEPS,
            ema=average, growth="early", budget={"growth_factor": 8.0},
            config={"early": {"false_keep": 0.9, "shares": [0.1, 0.2, 0.3]}}, **given,
        )  # fmt: skip


def test_what_came_together_is_saved_averaged_and_repeated(tmp_path: Path) -> None:
    run = Run()
    together = [
        {one.site for one in event.looked if one.grown}
        for event in run.growth.report().events
        if event.looked
    ]
    assert {INNER, "blocks+block"} in together, str(run.growth)
    assert {type(plan) for plan in run.growth.plans} == {WidenPlan, DeepenPlan}
    again = Net()
    resumed = run.begin(again, AveragedModel(again))
    resumed.load_state_dict(run.growth.state_dict())
    again.load_state_dict(run.net.state_dict())
    run.growth.finish()
    run.growth.save(tmp_path / "grown")
    loaded = esper.load_into(run.plain, tmp_path / "grown")
    x = run.draw(8)[0]
    assert torch.equal(loaded(x), run.net(x))
    assert torch.equal(again(x), run.net(x))
    run.average.update_parameters(run.net)  # it has the same tensors


def test_a_block_comes_where_what_came_with_it_does_not_fit() -> None:
    torch.manual_seed(0)
    net, draw = Net(), Task()
    growth = esper.grow(
        net, torch.optim.Adam(net.parameters()), cross_entropy, probe=[draw(64)], steps=STEPS, growth="early"
    )
    early, places = growth.loop.early, growth.run.morphable.places
    assert early is not None
    kernels: dict[str, Any] = {
        INNER: places[INNER].kernel(2),
        "blocks+block": places["blocks+block"].kernel(),
    }
    with torch.no_grad():
        for parameter in kernels[INNER].parameters():
            parameter.fill_(torch.nan)
    before = early.insertion.remember(0)
    unfit, failures = early.insertion.carry_out(kernels, dict.fromkeys(kernels, 1), before, {})
    assert unfit.keys() == failures.keys() == {INNER}
    assert [type(plan) for plan in growth.plans] == [DeepenPlan]
    assert net.blocks[1] is kernels["blocks+block"].block
    early.insertion.restore(before)
    assert len(net.blocks) == 1
    growth.finish()


def test_a_block_comes_where_the_loops_batches_fail_by_themselves() -> None:
    torch.manual_seed(0)
    net, draw = Net(), Task()
    growth = esper.grow(
        net, torch.optim.Adam(net.parameters()), cross_entropy, probe=[draw(64)], steps=STEPS, growth="early"
    )
    early, places = growth.loop.early, growth.run.morphable.places
    assert early is not None
    kernels: dict[str, Any] = {
        INNER: places[INNER].kernel(2),
        "blocks+block": places["blocks+block"].kernel(),
    }
    before = early.insertion.remember(0)
    early.insertion.trials = [lambda: torch.zeros(2) @ torch.zeros(3)]
    assert early.insertion.carry_out(kernels, {INNER: 2, "blocks+block": 1}, before, {}) == ({}, {})
    assert [type(plan) for plan in growth.plans] == [DeepenPlan, WidenPlan]
    assert net.blocks[1] is kernels["blocks+block"].block
    growth.finish()
