"""Losses that take gradients inside themselves: forces, and penalties on the gradients of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.contracts import Event

Batch = tuple[Tensor, Tensor, Tensor]


class Energies:
    """Points in a radial potential: places, energies and forces."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, n: int = 48) -> Batch:
        """Draw a batch."""
        x = torch.randn(n, 5, 3, generator=self.generator)
        radius = x.square().sum(-1, keepdim=True)
        return x, radius.sin().sum((1, 2)), -2 * x * radius.cos()


class Potential(nn.Module):
    """Energy and forces; ``graph`` says whether a gradient of the forces is kept."""

    def __init__(self, graph: Callable[[nn.Module], dict[str, bool]]) -> None:
        super().__init__()
        self.graph = graph
        self.net = nn.Sequential(
            nn.Linear(3, 2), nn.Tanh(), nn.Dropout(0.1), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.net(x).sum((1, 2))
            (slope,) = torch.autograd.grad(energy.sum(), x, **self.graph(self))
        return energy, -slope


def forces(model: nn.Module, batch: Batch) -> Tensor:
    """Return the loss of energies and forces."""
    energy, force = model(batch[0])
    return F.mse_loss(energy, batch[1]) + F.mse_loss(force, batch[2])


def trained(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    given: Callable[[nn.Module, Any], Tensor],
    growth: str | None = None,
) -> tuple[esper.Growth, list[Event]]:
    """Train by one loss, growing by another or the same."""
    torch.manual_seed(0)
    draw, events = Energies(), list[Event]()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    run = esper.grow(
        model,
        optimizer,
        given,
        probe=[draw(128) for _ in range(4)],
        steps=120,
        growth=growth,
        config={"early": {"false_keep": 0.4}},
        budget={"growth_factor": 8.0},
        on_event=events.append,
    )
    for _ in range(120):
        batch = draw()
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        run.step(batch, value)
    run.finish()
    return run, events


def always(model: nn.Module) -> dict[str, bool]:
    return {"create_graph": True}


ASKS: dict[str, Callable[[nn.Module], dict[str, bool]]] = {
    "create_graph": lambda model: {"create_graph": model.training},
    "and retain_graph": lambda model: {"create_graph": model.training, "retain_graph": model.training},
}


def potential(graph: Callable[[nn.Module], dict[str, bool]]) -> Potential:
    torch.manual_seed(3)
    return Potential(graph)


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_forces_with_a_graph_in_training_only_grow_as_with_one_always(
    asks: Callable[[nn.Module], dict[str, bool]],
) -> None:
    wanted, _ = trained(potential(always), forces, forces)
    found, events = trained(potential(asks), forces, forces)
    assert wanted.plans
    assert found.plans == wanted.plans
    for one, other in zip(found.model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [event.data for event in events if event.kind == "warning"] == []


def test_such_forces_can_be_raced() -> None:
    _, events = trained(potential(ASKS["create_graph"]), forces, forces, growth="incubate")
    outcomes = [str(event.data["reason"]) for event in events if event.kind == "outcome"]
    assert outcomes
    assert not [one for one in outcomes if "RuntimeError" in one or "graph" in one]


class Trained(Potential):
    """It has forces in training only, or gives away in evaluation what has no graph behind it."""

    detached = False

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.detached:
            energy, force = super().forward(x)
            return (energy, force) if self.training else (energy.detach(), force.detach())
        if not self.training:
            return self.net(x).sum((1, 2)), torch.zeros_like(x)
        x = x.detach().requires_grad_()
        energy = self.net(x).sum((1, 2))
        return energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


def test_forces_in_training_only_are_no_error() -> None:
    torch.manual_seed(3)
    run, _ = trained(Trained(always), forces, forces)
    assert run.report().events


def test_a_loss_without_a_gradient_in_evaluation_is_named_at_the_start() -> None:
    model = Trained(ASKS["create_graph"])
    model.detached = True
    _, events = trained(model, forces, forces)
    told = [str(event.data["message"]) for event in events if event.kind == "warning" and not event.step]
    assert [one for one in told if one.startswith("in evaluation mode the loss has no gradient")]


def attacked(model: nn.Module, batch: Batch) -> Tensor:
    """Return an adversarial loss: the direction of the attack is a constant, in training too."""
    x = batch[0].detach().requires_grad_()
    with torch.enable_grad():
        first = F.mse_loss(model(x).sum((1, 2)), batch[1])
        (slope,) = torch.autograd.grad(first, x)
    moved = x.detach() + 0.1 * slope / slope.norm()
    return F.mse_loss(model(moved).sum((1, 2)), batch[1])


def test_a_gradient_without_a_graph_in_training_has_none_in_evaluation() -> None:
    from esper.tolaria.growth.opening.entrance import as_needed

    torch.manual_seed(0)
    model, batch = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).eval(), Energies()(16)
    (wanted,) = torch.autograd.grad(attacked(model, batch), [model[0].weight])
    needed = as_needed(attacked, model, [batch])
    assert torch.equal(torch.autograd.grad(needed(model, batch), [model[0].weight])[0], wanted)


def penalised(model: nn.Module, batch: Batch) -> Tensor:
    """Return a loss with a penalty on how fast it falls."""
    loss = fitted(model, batch)
    slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + 1e-4 * sum((slope.square().sum() for slope in slopes), torch.zeros(()))


def fitted(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]).sum((1, 2)), batch[1])


def small() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))


def test_a_penalty_on_the_gradients_of_weights_is_named_with_what_to_write() -> None:
    run, _ = trained(small(), penalised, penalised)
    refused = dict(run.report().refused)
    assert "the loss takes gradients with respect to the tensors of 0" in refused["0"]
    assert "give esper.grow a loss_fn without that term" in refused["0"]


def test_what_is_written_there_grows() -> None:
    run, events = trained(small(), penalised, fitted)
    assert run.plans
    assert [event.data for event in events if event.kind == "warning"] == []
