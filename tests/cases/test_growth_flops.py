"""What growing may cost is asked before it is spent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import esper
from esper.tolaria.growth.evidence.evidence import Evidence
from esper.tolaria.growth.run.allowance import DEAR
from tests.cases.loops import Batch, Task, cross_entropy, narrow, train
from tests.cases.test_incubation_contained import Normed


def spent(net: nn.Module, most: float | None, steps: int = 80, **given: Any) -> esper.Growth:
    """Train with an allowance."""
    torch.manual_seed(0)
    draw, optimizer = Task(), torch.optim.Adam(net.parameters(), 0.01)
    growth = esper.grow(
        net,
        optimizer,
        cross_entropy,
        probe=[draw(256)],
        steps=steps,
        budget={"growth_flops": most},
        config={"early": {"false_keep": 0.4}},
        **given,
    )
    train(growth, net, optimizer, draw, steps)
    growth.finish()
    return growth


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.25, 0.5, 0.9])
def test_an_event_that_does_not_fit_is_declined_with_the_reason(share: float) -> None:
    whole = spent(narrow(), None)
    most = share * whole.cost.growth_flops
    growth = spent(narrow(), most)
    assert growth.cost.growth_flops <= most
    assert growth.loop.early is not None
    (last,) = [record for record in growth.loop.early.records if DEAR in record.reason]
    assert "and this could cost" in last.reason
    if share < 1e-6:
        assert growth.cost.growth_flops == 0
        assert "raise budget={'growth_flops': …}" in str(growth)
    if share == 0.9:
        assert growth.plans, "what fits is held"


def test_a_budget_that_suffices_changes_nothing() -> None:
    free = spent(narrow(), None)
    enough = spent(narrow(), 10 * free.cost.growth_flops)
    assert enough.plans == free.plans
    assert enough.cost.growth_flops == free.cost.growth_flops


@pytest.mark.parametrize("most", [1.0, 1e5, 1e6, 4e6])
def test_a_race_that_does_not_fit_is_not_begun(most: float) -> None:
    growth = spent(Normed(), most, 160, growth="incubate")
    assert growth.cost.growth_flops <= most


def images(batch: Batch) -> Batch:
    """Show the examples as images."""
    return F.pad(batch[0], (0, 54)).view(-1, 1, 8, 8), batch[1]


def convolving() -> nn.Sequential:
    """Build convolutions with a norm and pooling between."""
    first = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 2), nn.ReLU()
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 10))


@pytest.mark.parametrize("pictures", [False, True])
def test_a_look_costs_no_more_than_was_said(pictures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, prices = list[tuple[int, int]](), list[int]()
    begin, go_on = Evidence.begin, Evidence.go_on

    def priced(self: Evidence, places: Any, units: Any, spread: bool = False) -> None:
        prices.append(self.price(places, units)[0])
        begin(self, places, units, spread)

    def noted(self: Evidence) -> Any:
        found = go_on(self)
        if found is not None:
            pairs.append((prices[-1], found.flops))
        return found

    monkeypatch.setattr(Evidence, "begin", priced)
    monkeypatch.setattr(Evidence, "go_on", noted)
    torch.manual_seed(0)
    net, task = (convolving() if pictures else narrow()), Task()
    draw = (lambda n=48: images(task(n))) if pictures else task
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    growth = esper.grow(net, optimizer, cross_entropy, probe=[draw(256)], steps=60)
    train(growth, net, optimizer, draw, 60)
    assert pairs
    assert all(actual <= price <= 3 * actual for price, actual in pairs)
