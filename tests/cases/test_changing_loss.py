"""A loss that changes while it is trained on: events are judged by what the loss is now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.tolaria.growth.early.hindsight import Hindsight
from tests.cases.loops import Ran, Task, cross_entropy, narrow, run

STEPS = 80


class Ramp:
    """A loss times a factor that the loop sets."""

    def __init__(self) -> None:
        self.factor = 0.02

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss as it is now."""
        return cross_entropy(model, batch) * self.factor

    def each(self, i: int, growth: esper.Growth) -> None:
        """Raise the factor."""
        self.factor = 0.02 + i / STEPS


def verdicts(ran: Ran) -> list[str]:
    """List what became of every event."""
    assert ran.growth.loop.early is not None
    return [record.verdict for record in ran.growth.loop.early.records]


def reasons(ran: Ran) -> list[str]:
    """List what was said of every event."""
    assert ran.growth.loop.early is not None
    return [record.reason for record in ran.growth.loop.early.records]


@pytest.mark.parametrize("given", [{}, {"probe": "stream", "example": Task(5)(64)}])
def test_a_loss_that_is_warmed_up_takes_no_event_back(given: dict[str, Any]) -> None:
    ramp, net = Ramp(), narrow()
    ran = run(net, loss=ramp, each=ramp.each, steps=STEPS, **given)
    assert "kept" in verdicts(ran)
    assert "taken back" not in verdicts(ran)
    assert any("as the loss was at the event" in reason for reason in reasons(ran))


def test_a_loss_that_does_not_change_is_the_one_that_was_remembered() -> None:
    ran = run(narrow())
    assert "kept" in verdicts(ran)
    assert not any("as the loss was" in reason for reason in reasons(ran))
    assert not ran.warnings


class Recurrent(nn.Module):
    """An LSTM over a few steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.read, self.out = nn.LSTM(5, 2, batch_first=True), nn.Linear(2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        y: Tensor = self.out(self.read(x.view(-1, 2, 5))[0][:, -1])
        return y


class Block(nn.Module):
    """Adds what an MLP says."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream."""
        y: Tensor = x + self.down(torch.tanh(self.up(x)))
        return y


class Counted:
    """A config that is no module."""

    def __init__(self) -> None:
        self.num_layers = 1


class Deep(nn.Module):
    """A stack whose blocks a config counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = Counted()
        self.stem, self.layers, self.head = nn.Linear(10, 10), nn.ModuleList([Block()]), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x)
        return y


def normed() -> nn.Module:
    """Build a host with running statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 1), nn.BatchNorm1d(1), nn.Tanh(), nn.Linear(1, 10))


def rotated(n: int = 48) -> tuple[Tensor, Tensor]:
    """Draw what one hidden layer does not learn."""
    x = torch.randn(n, 10)
    weight = torch.randn(10, 10, generator=torch.Generator().manual_seed(0))
    return x, ((x @ weight).sin() @ weight.T).argmax(1)


@pytest.mark.parametrize(
    ("make", "draw"), [(narrow, Task()), (normed, Task()), (Recurrent, Task()), (Deep, rotated)]
)
def test_the_weights_of_then_are_measured_on_copies(
    make: Callable[[], nn.Module], draw: Callable[..., Any]
) -> None:
    """Bit for bit what was measured then, and nothing of the grown model is touched."""
    net, seen = make(), list[bool]()

    def each(i: int, growth: esper.Growth) -> None:
        early = growth.loop.early
        assert early is not None
        if early.open is None:
            return
        before, held = early.open, early.evidence.probe()
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        layers = len(net.layers) if isinstance(net, Deep) else 0
        then = Hindsight(growth.run, early.evidence, early.insertion).earlier(before, held)
        assert then == before.held_out
        assert state.keys() == net.state_dict().keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
        if isinstance(net, Deep):
            assert net.config.num_layers == len(net.layers) == layers
        seen.append(True)

    ran = run(net, draw=draw, each=each, steps=160)
    assert seen
    assert not ran.warnings


def test_what_cannot_be_measured_again_is_judged_by_what_was_remembered() -> None:
    net, widest = narrow(), [1]

    def loss(model: Any, batch: Any) -> Tensor:
        if model[0].out_features < widest[-1]:
            raise ValueError("it does not become narrower")
        return F.cross_entropy(model(batch[0]), batch[1])

    ran = run(net, loss=loss, each=lambda i, growth: widest.append(net[0].out_features))
    assert "kept" in verdicts(ran)
    (warning,) = ran.warnings
    assert "judged by the loss measured when it came" in warning
    assert "it does not become narrower" in warning
