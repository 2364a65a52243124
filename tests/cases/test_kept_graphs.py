"""Where a graph of the loop's keeps parameters from being exchanged, the user hears of it, and what to do."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts import Event
from tests.cases.loops import Task, cross_entropy


def summed(graphs: bool) -> tuple[nn.Module, list[nn.Parameter], esper.Growth, list[Event]]:
    """Train while a penalty is logged, with its graph, which has saved the weights, or as a number."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 1), nn.Tanh(), nn.Linear(1, 10))
    draw, held, events = Task(), list(net.parameters()), list[Event]()
    optimizer = torch.optim.Adam(held, 0.01)
    growth = esper.grow(
        net,
        optimizer,
        cross_entropy,
        probe=[draw(256)],
        steps=60,
        config={"early": {"false_keep": 0.4}},
        on_event=events.append,
    )
    total: Any = 0
    for _ in range(60):
        batch = draw()
        loss, size = cross_entropy(net, batch), net[0].weight.square().sum()
        total = total + (size if graphs else size.item())
        del size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step(batch, loss)
    growth.finish()
    assert growth.plans
    return net, held, growth, events


def test_parameters_that_became_others_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    net, held, growth, events = summed(graphs=True)
    told = [line for line in caplog.messages if "grew into new objects" in line]
    assert len(told) == 1
    assert "0.weight" in told[0]
    assert "loss.item()" in told[0]
    assert not all(p is q for p, q in zip(net.parameters(), held, strict=True))
    assert "make such lists anew from model.parameters()" in str(growth)
    assert len([e for e in events if e.kind == "warning" and "grew into new" in e.data["message"]]) == 1


def test_numbers_hold_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net, held, growth, _ = summed(graphs=False)
    assert all(p is q for p, q in zip(net.parameters(), held, strict=True))
    assert "new objects" not in str(growth)
