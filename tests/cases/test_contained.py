"""Nothing that goes wrong at an event ends training, and no half of an event stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import esper
from tests.cases.loops import Task, cross_entropy, narrow, run
from tests.unseen import noting


class Failing:
    """A loss that raises once, at a given call inside ``growth.step``."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.at, self.error, self.inside = at, error, False
        self.note, noted = noting()
        self.count = lambda: sum(noted)

    @property
    def calls(self) -> int:
        """Calls inside ``growth.step``."""
        return self.count()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss, or raise."""
        self.note(self.inside)
        if self.inside and self.calls == self.at:
            raise self.error("boom")
        return cross_entropy(model, batch)


def guarded(loss: Failing, steps: int = 60) -> tuple[esper.Growth, nn.Sequential, list[str], int]:
    """Train with a loss that fails; returns what grew, what was warned of, and the interrupts caught."""
    net, draw, warned = narrow(), Task(), list[str]()

    def note(event: esper.Event) -> None:
        if event.kind == "warning":
            warned.append(event.data["message"])

    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    settings = {"early": {"false_keep": 0.4}}
    growth = esper.grow(net, optimizer, loss, probe=[draw(256)], steps=steps, config=settings, on_event=note)
    caught = 0
    for _ in range(steps):
        batch = draw()
        value = loss(net, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        loss.inside = True
        plans, before = len(growth.plans), [p.shape for p in net.parameters()]
        try:
            growth.step(batch, value)
        except KeyboardInterrupt:
            caught += 1
            if len(growth.plans) == plans:
                assert [p.shape for p in net.parameters()] == before
        loss.inside = False
    growth.finish()
    return growth, net, warned, caught


@pytest.mark.parametrize("error", [RuntimeError, ZeroDivisionError, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", [1, 3, 5, 7, 9, 15])
def test_an_error_of_the_loss_skips_the_event(at: int, error: type[Exception]) -> None:
    loss = Failing(at, error)
    growth, net, warned, _ = guarded(loss)
    assert loss.calls >= at, "the error was never raised"
    assert growth.steps == 60
    assert growth.plans, "the events after it grow as always"
    assert len(warned) <= 1
    net(torch.randn(3, 10)).sum().backward()


@pytest.mark.parametrize("at", range(1, 28, 2))
def test_an_interrupt_leaves_no_half_of_an_event(at: int) -> None:
    growth, net, _, caught = guarded(Failing(at, KeyboardInterrupt))
    assert caught == 1
    assert growth.loop.early is not None
    layout = growth.run.morphable.layout
    stages = {
        layout.stage_of(seed).name
        for site in growth.run.morphable.places
        for seed in growth.run.morphable.seeds(site)
    }
    assert stages == {"DORMANT"}, "no seed stays on its way"
    kept = [r for r in growth.loop.early.records if r.verdict == "kept"]
    assert len(growth.plans) == len(kept), "whatever grew was judged"
    assert not [m for m in net if "_esper_seam" in vars(m)]


class Same(nn.Conv2d):
    """A layer whose call is its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Pad by hand."""
        return F.conv2d(F.pad(x, (1,) * 4), self.weight, self.bias)


class Calls(nn.Module):
    """A host whose forward is given."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.call = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.call(self, x)


TASK = Task()


def images(n: int = 48) -> tuple[Tensor, Tensor]:
    """Draw the task's examples as images."""
    x, y = TASK(n)
    return F.pad(x, (0, 54)).view(n, 1, 8, 8), y


def test_a_place_whose_units_do_not_run_closes_no_other() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        Same(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 1), nn.Tanh(), nn.Linear(1, 10)
    )
    ran = run(net, draw=images)
    assert not ran.outcomes("0>3")
    (reason,) = (r.reason for r in ran.growth.run.morphable.refusals if r.place == "0")
    assert "0 is a Same with a forward of its own" in reason
    assert net[3].out_features > 1, "the other place grows"


def test_a_place_that_cannot_be_inserted_is_tried_once() -> None:
    torch.manual_seed(0)
    net = Calls(
        lambda s, x: s.b(torch.tanh(s.a(s.l(torch.relu(s.c(x)).view(-1, 72))))),
        c=nn.Conv2d(1, 2, 3),
        l=nn.Linear(72, 16),
        a=nn.Linear(16, 1),
        b=nn.Linear(1, 10),
    )
    ran = run(net, draw=images, steps=160)
    assert len(ran.outcomes("c>l")) <= 1, "not put back again and again"
    assert net.a.out_features > 1, "the other place grows"


def test_a_pruned_bias_is_refused() -> None:
    net = narrow()
    prune.random_unstructured(net[0], "bias", 0.0)
    refusals = run(net).growth.run.morphable.refusals
    assert any("the bias of 0 is parametrised (or pruned)" in one.reason for one in refusals)


@pytest.mark.parametrize("step", [12, 22])
def test_a_head_replaced_by_hand_is_named_and_left_alone(step: int) -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    own: list[Tensor] = []

    def each(i: int, growth: esper.Growth) -> None:
        if i == step:
            net[2] = nn.Linear(net[0].out_features, 12)
            optimizer.add_param_group({"params": net[2].parameters()})
            own.append(net[2].weight)

    ran = run(net, each=each, optimizer=optimizer, steps=160)
    assert net[2].out_features == 12
    assert net[2].weight is own[0]
    assert net(torch.randn(2, 10)).shape == (2, 12)
    assert any("2 was replaced or removed" in reason for reason in ran.reasons)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_growth_step_without_gradients(mode: Callable[[], Any]) -> None:
    net, draw = narrow(), Task()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    growth = esper.grow(
        net, optimizer, cross_entropy, probe=[draw(256)], steps=60, config={"early": {"false_keep": 0.4}}
    )
    for _ in range(60):
        batch = draw()
        loss = cross_entropy(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with mode():
            growth.step(batch, loss.detach())
    growth.finish()
    assert growth.plans
    assert not any(p.is_inference() for p in net.parameters())
    cross_entropy(net, draw()).backward()
