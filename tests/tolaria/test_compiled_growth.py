"""Compiled hosts grow as plain ones do, number for number; graphs are counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.contracts import Event
from esper.errors import SiteError
from esper.kasmina.seeds.compiling import SEEN, apply

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
sees_seeds = pytest.mark.skipif(torch.__version__ < SEEN, reason="the graph would pass a seed by: refused")
WHOLE = [pytest.param("wrapped", marks=sees_seeds), pytest.param("in place", marks=sees_seeds)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 2), nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(examples: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, 10)
    return x, (x.roll(1, 1) * x + x.roll(3, 1)).argmax(1)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def trained(
    how: str, after: Callable[[Any], None] = lambda growth: None
) -> tuple[list[float], list[Event], Any, list[int]]:
    torch.manual_seed(0)
    host = Net()
    net: nn.Module = host
    if how == "wrapped":
        net = apply(host, "whole", backend="eager")
    elif how == "in place":
        host.compile(backend="eager")
    elif how == "regional":
        apply(host, "regional", backend="eager")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    events: list[Event] = []
    growth = esper.grow(
        net,
        optimizer,
        loss_fn,
        probe=[batch(512)],
        steps=240,
        budget={"growth_events": 3},
        growth="incubate",
        config={"schedule": {"warmup": 0.05}},
        on_event=events.append,
    )
    losses: list[float] = []
    counted: list[int] = []
    for _ in range(240):
        one, before = batch(32), graphs()
        loss = loss_fn(net, one)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        own = graphs()
        counted.append(own - before)
        growth.step(one, loss)
        after(growth)
        assert graphs() == own, "Esper's own passes compile nothing"
        losses.append(float(loss.detach()))
    assert growth.finish() is net
    return losses, events, growth, counted


@pytest.mark.parametrize("how", [*WHOLE, "regional"])
def test_a_compiled_host_grows_like_a_plain_one(how: str) -> None:
    plain, plain_events, told, _ = trained("plain")
    losses, events, growth, counted = trained(how)
    assert [(p.site, p.units) for p in growth.plans] == [(p.site, p.units) for p in told.plans]
    assert growth.plans, "something was kept"
    assert losses == plain
    unlike = {"recompiled", "vitals"}  # a graph does not stop to note what a kernel gave
    ours = [e.kind for e in events if e.kind not in unlike]
    assert ours == [e.kind for e in plain_events if e.kind not in unlike]
    told_of = [e.data for e in events if e.kind == "recompiled"]
    assert len(told_of) == len(growth.plans)
    assert {e["policy"] for e in told_of} == {"regional" if how == "regional" else "whole"}
    # what the user's own steps compiled: at first, at each exposure (whole), after each widening
    exposed = Counter(e.data.get("target") for e in events if e.kind == "stage")["GRAFTING"]
    woken = 0 if how == "regional" else exposed
    assert sum(counted[1:]) <= woken + len(growth.plans), (exposed, counted)


@pytest.mark.skipif(torch.__version__ >= SEEN, reason="the graph sees seeds")
def test_a_graph_that_would_pass_a_seed_by_is_refused() -> None:
    with pytest.raises(SiteError, match=rf"does not see a seed.*growth='early'.*torch>={SEEN}"):
        trained("wrapped")


@pytest.mark.parametrize("how", [WHOLE[0], "regional"])
def test_a_kernel_that_goes_bad_in_a_compiled_host_is_counted_and_culled(how: str) -> None:
    bad: list[int] = []

    def poison(growth: Any) -> None:
        for trial in growth.run.orchestrator.exposed:
            if not trial.origin.layer.exposed or len(bad) == 3:
                continue
            with torch.no_grad():
                trial.kernel.producer_bias.fill_(float("nan"))
            bad.append(growth.steps)

    losses, events, growth, _ = trained(how, poison)
    assert len(bad) == 3
    faults = [e for e in events if e.kind == "fault"]
    assert [e.data["error"] for e in faults[:3]] == ["a non-finite output"] * 3
    assert any(e.kind == "stage" and e.data["target"] == "ERROR" for e in events)
    assert all(math.isfinite(loss) for loss in losses)
    assert all(bool(p.isfinite().all()) for p in growth.model.parameters())
