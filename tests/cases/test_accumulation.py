"""Gradients that are accumulated: the loss handed over is a part of the loss, and the host is the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import esper
from esper.contracts import Event
from tests.cases.loops import Task, cross_entropy

STEPS = 60


def told(parts: int, width: int) -> list[Event]:
    """Train on the same batches, in one piece or handed over in parts of the loss; list what was told."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    draw, events = Task(), list[Event]()
    settings = {"early": {"false_keep": 0.4, "enough": 0.0}}
    growth = esper.grow(
        net, optimizer, cross_entropy, probe=[draw(256)], steps=STEPS, config=settings, on_event=events.append
    )
    for _ in range(STEPS):
        batch = draw(64)
        for part in range(parts):
            loss = cross_entropy(net, batch) / parts
            loss.backward()
            if part == parts - 1:
                optimizer.step()
                optimizer.zero_grad()
            growth.step(batch, loss)
    growth.finish()
    return events


@pytest.mark.parametrize(("width", "saturated"), [(1, False), (6, True)])
def test_a_host_is_re_opened_for_what_it_is_not_for_what_is_handed_over(width: int, saturated: bool) -> None:
    whole, parts = told(1, width), told(8, width)
    found = [[event.step for event in events if event.kind == "reopened"] for events in (whole, parts)]
    assert found[0] == found[1]
    assert bool(found[0]) is saturated
    losses = [event.data["loss"] for event in parts if event.kind == "reopened"]
    assert all(loss < 0.25 * 2.31 for loss in losses)
