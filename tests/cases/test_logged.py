"""Who listens to no events hears all the same what matters: by the logger ``esper``, once each."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.contracts import Event
from esper.log import Logged, shown_elsewhere
from tests.cases.loops import Task, cross_entropy, narrow


def silent(net: nn.Module, steps: int = 40, told: int | None = None, **given: Any) -> esper.Growth:
    """Train in a plain loop with nobody listening."""
    draw = Task()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    given = {"probe": [draw(256)], **given}
    growth = esper.grow(net, optimizer, cross_entropy, steps=told or steps, **given)
    for _ in range(steps):
        batch = draw()
        loss = cross_entropy(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step(batch, loss)
    growth.finish()
    return growth


def test_a_run_that_grows_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    growth = silent(narrow(), 160)
    assert growth.plans
    assert caplog.messages == []


def test_a_run_that_has_grown_nothing_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    draw = Task()
    silent(narrow(), probe=[draw(8)])
    assert [r.name for r in caplog.records] == ["esper"] * len(caplog.records)
    assert all(r.levelno == logging.WARNING for r in caplog.records)
    last = caplog.messages[-1]
    assert last.startswith("step 40: nothing has grown: the probe has 8 examples")
    assert len(caplog.messages) == len(set(caplog.messages))


def test_steps_that_never_came_are_named(caplog: pytest.LogCaptureFixture) -> None:
    net, draw = narrow(), Task()
    watched, other = torch.optim.Adam(net.parameters()), torch.optim.SGD(net.parameters(), 0.1)
    growth = esper.grow(net, watched, cross_entropy, probe=[draw(256)], steps=40)
    for _ in range(40):
        batch = draw()
        loss = cross_entropy(net, batch)
        other.zero_grad()
        loss.backward()
        other.step()
        growth.step(batch, loss)
    assert len([line for line in caplog.messages if "has taken a step" in line]) == 1


def test_growth_step_that_was_never_called_is_named_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    net, draw = narrow(), Task()
    growth = esper.grow(net, torch.optim.Adam(net.parameters()), cross_entropy, probe=[draw(256)], steps=40)
    growth.finish()
    assert "growth.step was never called" in caplog.messages[-1]


def test_it_is_seen_without_any_setting_up_and_warnings_as_errors_end_nothing() -> None:
    code = """
import torch, esper
net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(net.parameters(), 0.1)
growth = esper.grow(net, optimizer, lambda m, b: m(b).square().mean(), probe=[torch.randn(8, 4)], steps=5)
growth.finish()
"""
    line = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert "nothing has grown" in done.stderr
    assert done.stdout == ""


def test_what_a_view_shows_is_not_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    say, logger = Logged(), logging.getLogger("esper")
    before, logger.propagate = logger.propagate, False  # pytest's own handlers are at the root
    try:
        with shown_elsewhere():
            say(Event("warning", 1, {"message": "one"}))
        say(Event("warning", 2, {"message": "two"}))
    finally:
        logger.propagate = before
    assert capsys.readouterr().err == "step 2: two\n"


def test_one_kind_of_detour_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    say = Logged()
    for step in range(3):
        say(Event("fallback", step, {"what": "race", "why": f"no batching rule {step}"}))
    assert caplog.messages == ["step 0: race: no batching rule 0"]
