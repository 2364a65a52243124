"""Growth counts the steps of whichever optimizer takes them, and says so where it sees none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import esper
from esper.contracts import Event
from esper.errors import OptimizerError
from esper.surgery.optimizers.inner import with_inner
from tests.cases.loops import Ran, Task, cross_entropy, narrow


class Sharp(Optimizer):
    """Sharpness-aware minimisation, as its implementations are written: the base steps, never itself."""

    def __init__(self, parameters: Iterable[nn.Parameter], base: type[Optimizer], **settings: Any) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb."""
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["e"] = 0.05 * parameter.grad
            parameter.add_(self.state[parameter]["e"])

    @torch.no_grad()
    def second_step(self) -> None:
        """Come back, and step."""
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(self.state[parameter]["e"])
        self.base_optimizer.step()


class Unmade(Optimizer):
    """A wrapper without a constructor of its base class, as some libraries' are."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        """Pass on."""
        return self.optimizer.param_groups


def trained(
    net: nn.Module, given: Any, step: Callable[[Any, Callable[[], None]], None], steps: int = 80, **more: Any
) -> Ran:
    """Train by a step of one's own, which is given the optimizer and what computes gradients anew."""
    draw, events = Task(), list[Event]()
    growth = esper.grow(
        net,
        given,
        cross_entropy,
        probe=[draw(256)],
        steps=steps,
        config={"early": {"false_keep": 0.4}},
        on_event=events.append,
        **more,
    )
    for _ in range(steps):
        batch = draw()
        loss = cross_entropy(net, batch)
        net.zero_grad()
        loss.backward()

        def again(batch: Any = batch) -> None:
            net.zero_grad()
            cross_entropy(net, batch).backward()

        step(given, again)
        growth.step(batch, loss)
    growth.finish()
    return Ran(growth, events)


def by_sharpness(optimizer: Any, again: Callable[[], None]) -> None:
    """Take both steps."""
    optimizer.first_step()
    again()
    optimizer.second_step()


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_wrapper_that_steps_what_is_within(base: type[Optimizer]) -> None:
    net = narrow()
    settings = {"momentum": 0.9} if base is torch.optim.SGD else {}
    optimizer = Sharp(net.parameters(), base, lr=0.02, **settings)
    ran = trained(net, optimizer, by_sharpness)
    assert ran.growth.steps == 80
    assert ran.growth.plans
    for parameter in net.parameters():
        known = optimizer.base_optimizer.state[parameter]
        assert all(v.shape == parameter.shape for v in known.values() if torch.is_tensor(v) and v.dim())


def test_the_first_of_two_optimizers_may_rest() -> None:
    net, side = narrow(), nn.Linear(2, 2)
    given = {
        "side": torch.optim.SGD(side.parameters(), 0.1),
        "main": torch.optim.Adam(net.parameters(), 0.01),
    }
    ran = trained(net, given, lambda own, again: own["main"].step())
    assert ran.growth.steps == 80
    assert ran.growth.plans


def test_optimizers_that_take_turns_count_each_round() -> None:
    net = narrow()
    given = {
        "in": torch.optim.Adam(net[0].parameters(), 0.01),
        "out": torch.optim.Adam(net[2].parameters(), 0.01),
    }
    turns = iter(["in", "out"] * 40)
    assert trained(net, given, lambda own, again: own[next(turns)].step()).growth.steps == 80
    given = {
        "in": torch.optim.Adam(net[0].parameters(), 0.01),
        "out": torch.optim.Adam(net[2].parameters(), 0.01),
    }
    assert trained(net, given, lambda own, again: [one.step() for one in own.values()]).growth.steps == 80


def test_no_step_at_all_is_told_once_with_what_to_do() -> None:
    net = narrow()
    other = torch.optim.Adam(net.parameters(), 0.01)
    ran = trained(net, torch.optim.Adam(net.parameters(), 0.01), lambda own, again: other.step())
    (told,) = ran.warnings
    assert "growth.step was called 20 times" in told
    assert "'optimizer' (Adam)" in told
    assert "give it the one whose step() the loop calls" in str(ran.growth.report())
    assert "learning rate was gone" not in str(ran.growth)


@pytest.mark.parametrize("growth", ["early", "incubate"])
def test_an_optimizer_that_is_replaced_is_told(growth: str) -> None:
    net = narrow()
    first, second = (torch.optim.Adam(net.parameters(), 0.01) for _ in range(2))
    turns = iter([first] * 3 + [second] * 77)
    ran = trained(net, first, lambda own, again: next(turns).step(), growth=growth)
    assert any("has stepped since step 3" in message for message in ran.warnings)
    assert "has stepped since step 3" in str(ran.growth)


def test_accumulated_gradients_are_no_silence() -> None:
    net = narrow()
    optimizer, calls = torch.optim.Adam(net.parameters(), 0.01), iter(range(200))
    ran = trained(net, optimizer, lambda own, again: own.step() if next(calls) % 16 == 15 else None, 190)
    assert ran.growth.steps == 11
    assert not [message for message in ran.warnings if "stepped" in message]


def test_a_wrapper_without_its_base_class_stands_for_what_is_within() -> None:
    net = narrow()
    inner = torch.optim.Adam(net.parameters(), 0.01)
    wrapper = Unmade(inner)
    assert with_inner({"it": wrapper}) == {"it.optimizer": inner}
    ran = trained(net, wrapper, lambda own, again: own.optimizer.step())
    assert ran.growth.plans


def test_what_cannot_be_watched_is_refused() -> None:
    class Bare(Optimizer):
        def __init__(self) -> None:
            self.param_groups = []

    class Holder:
        def __init__(self, inner: Optimizer) -> None:
            self.base = inner

    net = narrow()
    with pytest.raises(OptimizerError, match="steps cannot be seen"):
        esper.grow(net, Bare(), cross_entropy, probe=[Task()(256)], steps=9)
    held: Any = Holder(torch.optim.Adam(net.parameters()))
    with pytest.raises(OptimizerError, match="give its base"):
        esper.grow(net, held, cross_entropy, probe=[Task()(256)], steps=9)
