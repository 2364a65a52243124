"""A small task and a plain loop, as the listed cases use them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.contracts import Event

Batch = tuple[Tensor, Tensor]


class Task:
    """Ten classes around ten corners, (n, 10) and (n,)."""

    def __init__(self, seed: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, n: int = 48) -> Batch:
        """Draw a batch."""
        y = torch.randint(10, (n,), generator=self.generator)
        return 2 * torch.eye(10)[y] + 0.5 * torch.randn(n, 10, generator=self.generator), y


def narrow(seed: int = 0) -> nn.Sequential:
    """Build a host that is far too narrow."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 1), nn.Tanh(), nn.Linear(1, 10))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Return the usual loss."""
    return F.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Ran:
    """A run that is over."""

    growth: esper.Growth
    events: list[Event] = field(default_factory=list)

    def outcomes(self, site: str | None = None) -> list[Any]:
        """List the outcomes, of one site or of all."""
        found = [e.data for e in self.events if e.kind == "outcome"]
        return [one for one in found if site in (None, one["site"])]

    @property
    def warnings(self) -> list[str]:
        """List what was warned of."""
        return [e.data["message"] for e in self.events if e.kind == "warning"]

    @property
    def reasons(self) -> list[str]:
        """List what the report says of places."""
        assert self.growth.loop.early is not None
        return [one.reason for record in self.growth.loop.early.records for one in record.looked]


def run(
    net: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    draw: Callable[..., Any] | None = None,
    probe: Iterable[Any] | None = None,
    steps: int = 80,
    each: Callable[[int, esper.Growth], None] = lambda i, growth: None,
    optimizer: torch.optim.Optimizer | None = None,
    **given: Any,
) -> Ran:
    """Train a host in a plain loop."""
    made = draw or Task()
    optimizer = optimizer or torch.optim.Adam(net.parameters(), 0.01)
    events: list[Event] = []
    held = [made(256)] if probe is None else probe
    growth = esper.grow(
        net,
        optimizer,
        loss,
        probe=held,
        steps=steps,
        on_event=events.append,
        **{"budget": {"growth_factor": 8.0}, "config": {"early": {"false_keep": 0.4}}, **given},
    )
    train(growth, net, optimizer, made, steps, loss, each)
    growth.finish()
    return Ran(growth, events)


def train(
    growth: esper.Growth,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    draw: Callable[..., Any],
    steps: int,
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    each: Callable[[int, esper.Growth], None] = lambda i, growth: None,
) -> None:
    """Go on for so many steps, as any loop does."""
    for i in range(steps):
        batch = draw()
        value = loss(net, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        growth.step(batch, value)
        each(i, growth)
