"""What goes wrong while candidates incubate ends their seed, never training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.contracts import Event
from esper.errors import SiteError
from tests.cases.loops import Ran, Task, run
from tests.cases.test_contained import Failing


class Normed(nn.Module):
    """A host in which nothing can be widened, so it is raced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(10, 6), nn.LayerNorm(6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.b(F.relu(self.n(self.a(x))))


def guarded(loss: Failing, net: nn.Module, finish_fails: bool = False, steps: int = 90) -> Ran:
    """Train with a loss that fails inside ``growth.step``, or inside ``growth.finish``."""
    draw, events = Task(), list[Event]()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    growth = esper.grow(
        net, optimizer, loss, probe=[draw(256)], steps=steps, growth="incubate", on_event=events.append
    )
    for _ in range(steps):
        batch = draw()
        value = loss(net, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss.inside = not finish_fails
        growth.step(batch, value)
        loss.inside = False
    loss.inside = finish_fails
    growth.finish()
    return Ran(growth, events)


def is_plain(ran: Ran) -> bool:
    """Tell whether nothing is awake, and whether the host still trains."""
    net = ran.growth.model
    net(torch.randn(3, 10)).sum().backward()
    seams = [path for path, module in net.named_modules() if "_esper_seam" in vars(module)]
    return not ran.growth.run.morphable.layers and not seams


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ZeroDivisionError])
@pytest.mark.parametrize("at", [1, 2, 3, 6, 8, 12, 14, 20])
def test_an_error_of_the_loss_ends_the_seed(at: int, error: type[Exception]) -> None:
    torch.manual_seed(0)
    loss, net = Failing(at, error), Normed()
    ran = guarded(loss, net)
    assert loss.calls >= at, "the error was never raised"
    assert ran.growth.steps == 90
    assert [w for w in ran.warnings if "boom" in w][1:] == [], "told once"
    assert is_plain(ran)


def test_memory_that_stays_short_ends_no_run() -> None:
    class Short(Failing):
        def __call__(self, model: nn.Module, batch: Any) -> Tensor:
            self.at = self.calls + 1  # every time
            return super().__call__(model, batch)

    loss, net = Short(1, torch.OutOfMemoryError), Normed()
    ran = guarded(loss, net)
    assert [w for w in ran.warnings if "boom" in w] == [
        "incubation was skipped, training goes on: OutOfMemoryError: boom"
    ]
    assert is_plain(ran)


def test_a_last_look_that_fails_drops_the_seed() -> None:
    torch.manual_seed(0)
    net = Normed()
    ran = guarded(Failing(1, RuntimeError), net, finish_fails=True, steps=40)
    assert ran.growth.finished
    assert is_plain(ran)


class Skipping(nn.Module):
    """Residual blocks that training leaves out at random, as stochastic depth does."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance
        self.i, self.o = nn.Linear(10, 4), nn.Linear(4, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(3)
        )
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        x = self.i(x)
        for block in self.blocks:
            if not (self.training and float(torch.rand(())) < self.chance):
                x = x + block(x)
        return self.o(x)


@pytest.mark.parametrize("chance", [0.4, 0.5])
def test_a_lesson_that_does_not_come_by_the_site_is_missed(chance: float) -> None:
    torch.manual_seed(1)
    net = Skipping(chance)
    ran = run(net, steps=200, growth="incubate", sites=["blocks*"])
    assert not [w for w in ran.warnings if "skipped" in w]
    told = [e.data["why"] for e in ran.events if e.kind == "fallback" and e.data["what"] == "race"]
    assert any("lessons were missed: the pass did not come by blocks" in why for why in told)


class Graph(nn.Module):
    """A graph network: each batch is one graph, and its adjacency belongs to its own nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 3), nn.Linear(3, 10)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        """Run it."""
        return self.b(adjacency @ F.relu(self.a(x)))


def test_graphs_are_not_joined() -> None:
    draw, adjacency = Task(), (torch.rand(48, 48) < 0.1).float() + torch.eye(48)

    def graph(n: int = 48) -> Any:
        x, y = draw(48)
        return x, adjacency, y

    def loss(net: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(net(batch[0], batch[1]), batch[2])

    ran = run(Graph(), loss, graph, steps=80)
    assert ran.growth.run.recipe == "incubate"
    assert ran.growth.run.parts.joins.apart
    assert not ran.growth.run.parts.gate.worth.cut
    assert not [w for w in ran.warnings if "skipped" in w]
    assert ran.growth.steps == 80


class Complex(nn.Module):
    """Layers of complex numbers between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(10, 4, dtype=torch.complex64)
        self.b = nn.Linear(4, 10, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.b(torch.tanh(self.a(x.cfloat()))).abs()


class Within(nn.Module):
    """A host of which a part computes with complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.o = Complex(), nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10))

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        return self.o(self.inner(x))


def test_layers_of_complex_numbers_are_refused_at_the_start() -> None:
    with pytest.raises(SiteError, match="a computes with complex numbers"):
        run(Complex())


def test_a_part_that_computes_with_complex_numbers_closes_no_other() -> None:
    ran = run(Within(), growth="incubate", steps=60)
    reasons = {one.place: one.reason for one in ran.growth.run.morphable.refusals}
    assert "complex numbers" in reasons["inner"]
    assert not [w for w in ran.warnings if "skipped" in w]


class Routed(nn.Module):
    """Two experts, each for the rows that a router sends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(10, 2)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(10, 1), nn.ReLU(), nn.Linear(1, 10)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = x
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return out


def test_what_cannot_be_told_of_a_loss_is_not_called_coupling() -> None:
    torch.manual_seed(0)
    ran = run(Routed(), steps=80, growth="incubate")
    assert any("cannot be told whether the loss couples" in one for one in ran.warnings)
    assert not any("whose examples the loss couples" in one["reason"] for one in ran.outcomes())
    per_example = run(
        Routed(),
        steps=80,
        growth="incubate",
        per_example=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
    )
    assert not any("cannot be told" in one for one in per_example.warnings)
