"""A run of any length is laid out in no time: its learning rate is looked at in so many points."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

import esper
from esper.tamiyo.early import POINTS, placed
from esper.tolaria.growth.early.rates import forecast
from tests.cases.loops import Task, cross_entropy, narrow

SHARES = (0.03, 0.08, 0.15, 0.25, 0.4, 0.6)


def a_rate() -> SGD:
    """Make an optimizer of rate 1."""
    return SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_longest_run_begins_at_once(scheduled: bool) -> None:
    net, steps = narrow(), 10**8
    optimizer = SGD(net.parameters(), 0.1)
    schedulers = [CosineAnnealingLR(optimizer, 100)] if scheduled else []
    tracemalloc.start()
    growth = esper.grow(net, optimizer, cross_entropy, probe=[Task()(64)], steps=steps, schedulers=schedulers)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert growth.loop.early is not None
    assert growth.loop.early.timetable.due == sorted(growth.loop.early.timetable.shares)
    assert 0.01 * steps < growth.loop.early.timetable.due[0] < 0.03 * steps
    growth.finish()


@pytest.mark.parametrize("steps", [100, POINTS])
def test_a_short_run_is_looked_at_step_by_step(steps: int) -> None:
    optimizer = a_rate()
    scheduler = CosineAnnealingLR(optimizer, steps)
    seen = forecast([scheduler], optimizer, steps, 0)
    lived = []
    for _ in range(steps):
        lived.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == lived


def test_a_long_run_falls_where_its_steps_would_put_it() -> None:
    steps = 40 * POINTS
    optimizer = a_rate()
    seen = forecast([CosineAnnealingLR(optimizer, 100)], optimizer, steps, 0)
    assert seen is not None
    assert len(seen) == POINTS
    each = [rate for rate in seen for _ in range(40)]
    for near, exact in zip(placed(SHARES, seen, steps), placed(SHARES, each, steps), strict=True):
        assert abs(near - exact) <= 40
