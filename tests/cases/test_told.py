"""An error of the loss in any call that Esper makes is told by its name, and ends nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.contracts import Event
from tests.cases.loops import Task, narrow, train
from tests.cases.test_contained import Failing
from tests.cases.test_incubation_contained import Normed

ERRORS = (torch.OutOfMemoryError, RuntimeError, ZeroDivisionError, torch.linalg.LinAlgError)
STEPS = 40
TOLD = ("warning", "fallback", "outcome")


class Rows(nn.Module):
    """Like blocks in a row, which can be widened and deepened."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(10, 4), nn.Linear(4, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2), nn.GELU(), nn.Linear(2, 4)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        x = self.i(x)
        for block in self.blocks:
            x = x + block(x)
        return self.o(x)


HOSTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "early": (narrow, {"growth": "early"}),
    "a look over many steps": (narrow, {"growth": "early"}),
    "rows": (Rows, {"growth": "early", "sites": ["blocks*"]}),
    "stream": (narrow, {"growth": "early", "probe": "stream"}),
    "pairs are raced": (narrow, {"growth": "incubate"}),
    "branches are raced": (Normed, {"growth": "incubate"}),
}


def trained(case: str, loss: Failing) -> tuple[nn.Module, list[Event]]:
    """Train in a plain loop; the loss fails at some call inside ``growth.step`` or ``growth.finish``."""
    torch.manual_seed(0)
    make, given = HOSTS[case]
    net, draw, events = make(), Task(), list[Event]()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    held = {"example": draw()} if "probe" in given else {"probe": [draw(64)]}
    settings = {"early": {"false_keep": 0.4}, "gate": {"false_keep": 0.9}}
    growth = esper.grow(
        net,
        optimizer,
        loss,
        steps=STEPS,
        budget={"growth_factor": 8.0},
        config=settings,
        on_event=events.append,
        **{**held, **given},
    )
    if case == "a look over many steps":
        assert growth.loop.early is not None
        growth.loop.early.evidence.dear = 1
    for _ in range(STEPS):
        batch = draw()
        value = loss(net, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss.inside = True
        growth.step(batch, value)
        loss.inside = False
    loss.inside = True
    growth.finish()
    loss.inside = False
    assert growth.steps == STEPS
    return net, events


def calls(case: str) -> int:
    """Count the calls of the loss that Esper makes in a whole run."""
    counted = Failing(0, RuntimeError)
    trained(case, counted)
    return counted.calls


def swept(case: str, most: int | None) -> list[str]:
    """Let so many calls fail, or every one, each in a run of its own; returns what went wrong."""
    total = calls(case)
    assert total >= len(ERRORS)
    stride = 1 if most is None else total // most
    wrong = list[str]()
    for tried, at in enumerate(range(stride, total + 1, stride)):
        error = ERRORS[tried % len(ERRORS)]
        loss = Failing(at, error)
        net, events = trained(case, loss)
        named = f"{error.__name__}: boom"
        told = [one for one in events if one.kind in TOLD and named in str(one.data)]
        if not told:
            wrong.append(f"call {at}: {error.__name__} was told by nobody")
        if [path for path, module in net.named_modules() if "_esper_seam" in vars(module)]:
            wrong.append(f"call {at}: a seam is left after {error.__name__}")
        net(torch.randn(3, 10)).sum().backward()
    return wrong


@pytest.mark.parametrize("case", HOSTS)
def test_errors_of_the_loss_are_told(case: str) -> None:
    assert swept(case, len(ERRORS)) == []


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", HOSTS)
def test_an_error_of_the_loss_at_any_call_is_told(case: str) -> None:
    assert swept(case, None) == []


def test_a_loss_without_a_batching_rule_is_told_with_its_price() -> None:
    torch.manual_seed(0)

    def reads(model: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss if loss.item() >= 0 else -loss

    draw, events = Task(), list[Event]()
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    growth = esper.grow(
        net, optimizer, reads, probe=[draw(64)], steps=STEPS, growth="incubate", on_event=events.append
    )
    train(growth, net, optimizer, draw, STEPS, reads)
    growth.finish()
    told = {str(one.data["what"]): str(one.data["why"]) for one in events if one.kind == "fallback"}
    assert ".item()" in told["race"]
    assert told["race"].endswith("candidates ran one by one, a pass for each in place of one")
    assert told["evidence"].endswith("examples were run one by one, 48 passes in place of one")
    assert not [one for one in events if one.kind == "warning" and "skipped" in str(one.data)]
