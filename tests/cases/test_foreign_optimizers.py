"""Optimizers that torch does not ship: kind I of the cases, and the layers a batch may not reach: kind C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import esper
from tests.cases.loops import Task, narrow, run

STEPS = 60


class ScheduleFree(Optimizer):
    """Keeps two copies of the weights, as schedule-free descent does (Defazio et al. 2024)."""

    def __init__(self, parameters: Any, lr: float = 0.3) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move all three."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"z": p.clone(), "x": p.clone(), "k": 0}
                state["k"] += 1
                state["z"].sub_(p.grad, alpha=group["lr"])
                state["x"].lerp_(state["z"], 1 / state["k"])
                p.copy_(state["z"].lerp(state["x"], 0.9))


class Beside(Optimizer):
    """Keeps its momenta beside its state."""

    def __init__(self, parameters: Any, early: bool) -> None:
        super().__init__(parameters, {"lr": 0.03})
        self.momenta = {id(p): torch.zeros_like(p) for g in self.param_groups for p in g["params"] if early}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step with momentum."""
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.momenta.setdefault(id(p), torch.zeros_like(p))
                p.sub_(momentum.mul_(0.9).add_(p.grad), alpha=group["lr"])


class Outer(Optimizer):
    """Steps an optimizer of its own."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.Adam(self.param_groups, 0.01)
        self.param_groups = self.base.param_groups

    def step(self, closure: Any = None) -> None:
        """Let it step."""
        self.base.step()


def test_copies_of_weights_are_filled_with_weights() -> None:
    net = narrow()
    optimizer = ScheduleFree(net.parameters())
    smallest: list[float] = []

    def each(i: int, growth: esper.Growth) -> None:
        if net[0].out_features > 1:
            smallest.append(float(net[0].weight.detach().norm(dim=1).min()))

    assert run(net, optimizer=optimizer, steps=STEPS, each=each).outcomes()
    assert smallest
    assert min(smallest) > 0.2, "a unit that has come is not pulled to nought"


def test_state_beside_the_state_is_named_at_the_start() -> None:
    net = narrow()
    with pytest.raises(esper.OptimizerError, match=r"Beside 'optimizer' keeps tensors .* in \.momenta"):
        run(net, optimizer=Beside(net.parameters(), early=True))


def test_state_beside_the_state_that_comes_later_is_named_in_the_report() -> None:
    net = narrow()
    ran = run(net, optimizer=Beside(net.parameters(), early=False), steps=STEPS)
    assert net[0].out_features == 1
    assert any("in .momenta, where they cannot grow with them" in reason for reason in ran.reasons)
    assert "larger probe" not in str(ran.growth)


def test_an_inner_optimizer_is_followed() -> None:
    net = narrow()
    ran = run(net, optimizer=Outer(net.parameters()), steps=STEPS)
    assert ran.growth.steps == STEPS
    assert net[0].out_features > 1


class Heads(nn.Module):
    """One trunk, and a head for each kind of batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = nn.Linear(10, 2), nn.ModuleList([nn.Linear(2, 10), nn.Linear(2, 10)])

    def forward(self, x: Tensor, kind: int) -> Tensor:
        """Return the logits of a head."""
        y: Tensor = self.heads[kind](torch.tanh(self.trunk(x)))
        return y


def alternating(kinds: Callable[[int], int]) -> Callable[..., Any]:
    task, count = Task(), iter(range(10**6))
    return lambda n=48: (*task(n), kinds(next(count)))


def by_kind(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0], batch[2]), batch[1])


def test_a_head_that_has_not_run_bars_the_trunk() -> None:
    said = (
        r"heads\.0 was not called, and takes as many inputs as trunk makes; let the first batch of the probe"
    )
    with pytest.raises(esper.SiteError, match=said):
        run(Heads(), loss=by_kind, draw=alternating(lambda i: 1), growth="early")
    draw = alternating(lambda i: 1 - i % 2)
    probe = [draw(64) for _ in range(4)]  # later batches of it are not recorded
    with pytest.raises(esper.SiteError, match=said):
        run(Heads(), loss=by_kind, draw=draw, probe=probe, growth="early")


class Mixed(Heads):
    """The same for batches in which each row has a kind, (n,)."""

    def forward(self, x: Tensor, kind: Any) -> Tensor:
        """Return the logits of each row's head; a head without rows is not called."""
        h, y = torch.tanh(self.trunk(x)), torch.zeros(len(x), 10)
        for index, head in enumerate(self.heads):
            rows = kind == index
            if bool(rows.any()):
                y = torch.where(rows.unsqueeze(1), head(h), y)
        return y


def test_a_first_batch_that_uses_all_heads_opens_the_trunk() -> None:
    net, task, count = Mixed(), Task(), iter(range(10**6))

    def draw(n: int = 48) -> Any:
        """Give all rows of a training batch one kind; the probe has both."""
        i = next(count)
        return (*task(n), torch.arange(n) % 2 if n > 48 else torch.full((n,), i % 2))

    ran = run(net, loss=by_kind, draw=draw, steps=STEPS, growth="early")
    assert ran.growth.run.morphable.names == ["trunk>heads.0+heads.1"]
    assert net.trunk.out_features > 2
    assert [head.in_features for head in net.heads] == [net.trunk.out_features] * 2


def test_what_would_not_run_on_a_batch_of_the_loop_is_put_back() -> None:
    net = Heads()
    ran = run(
        net, loss=by_kind, draw=alternating(lambda i: i % 2), steps=STEPS, sites="trunk*", growth="early"
    )
    assert net.trunk.out_features == 2
    assert any("it does not run on a batch of the loop" in reason for reason in ran.reasons)
