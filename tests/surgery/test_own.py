"""What trains a branch until it is kept: like the layer's own where that can, and told where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Muon, Optimizer

from esper.kasmina.race.own_optimizers import OwnOptimizers, needs_closure
from esper.surgery.optimizers.closures import before_closures
from tests.surgery.zoo import OPTIMIZERS, SCHEDULERS, VARIANTS

Told = list[tuple[str, str]]


def make(host: Any, made: dict[str, Optimizer]) -> tuple[Any, nn.Module, OwnOptimizers, Told]:
    told: Told = []
    place: Any = SimpleNamespace(ends=lambda: (host.fc1, host.fc2))
    return place, nn.Linear(4, 5), OwnOptimizers(made, lambda what, why: told.append((what, why))), told


def step(kernel: nn.Module, own: Optimizer) -> None:
    kernel(torch.randn(8, 4)).square().mean().backward()
    own.step()


@pytest.mark.parametrize("name", {**OPTIMIZERS, **VARIANTS})
def test_every_class_gives_a_branch_an_optimizer_that_trains_it(host: Any, name: str) -> None:
    made = {**OPTIMIZERS, **VARIANTS}[name](host)
    place, kernel, owns, told = make(host, made)
    states = [len(one.state) for one in made.values()]
    own = owns.like(kernel, place)
    before = [p.clone() for p in kernel.parameters()]
    for _ in range(3):
        owns.follow(own)
        step(kernel, own)
    assert not any(torch.equal(p, old) for p, old in zip(kernel.parameters(), before, strict=True))
    assert [len(one.state) for one in made.values()] == states
    assert bool(told) == (name.split()[0] in {"LBFGS", "Muon"})


def test_settings_are_the_group_s(host: Any) -> None:
    rest = [*host.norm.parameters(), host.embed.weight]
    layer = {"params": [*host.fc1.parameters(), *host.fc2.parameters()], "lr": 0.3, "eps": 1e-5}
    layer |= {"initial_accumulator_value": 0.25}
    place, kernel, owns, told = make(host, {"main": Adagrad([{"params": rest}, layer], lr=0.01)})
    own = owns.like(kernel, place)
    group = own.param_groups[0]
    assert (type(own), group["lr"], group["eps"], told) == (Adagrad, 0.3, 1e-5, [])
    step(kernel, own)
    assert all(state["sum"].min() >= 0.25 for state in own.state.values())


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_rate_and_momentum_follow_every_scheduler(host: Any, scheduler: str) -> None:
    optimizer = AdamW(host.parameters(), lr=0.02)
    place, kernel, owns, _ = make(host, {"main": optimizer})
    schedule: Any = SCHEDULERS[scheduler](optimizer)
    own = owns.like(kernel, place)
    for _ in range(6):
        optimizer.step()
        schedule.step(1.0) if scheduler == "ReduceLROnPlateau" else schedule.step()
        owns.follow(own)
        for key in ("lr", "betas"):
            assert own.param_groups[0][key] == optimizer.param_groups[0][key]


def test_beside_muon_it_is_like_the_other_one_and_lbfgs_gets_adam(host: Any) -> None:
    matrices = [p for p in host.parameters() if p.dim() == 2]
    vectors = [p for p in host.parameters() if p.dim() == 1]
    place, kernel, owns, told = make(host, {"muon": Muon(matrices), "rest": AdamW(vectors, lr=0.004)})
    own = owns.like(kernel, place)
    assert (type(own), own.param_groups[0]["lr"]) == (AdamW, 0.004)
    said = "Muon cannot train a branch on its own; AdamW as the host's other one does until it is kept"
    assert told == [("optimizer", said)]

    place, kernel, owns, told = make(host, {"main": LBFGS(host.parameters(), lr=1)})
    own = owns.like(kernel, place)
    assert (type(own), own.param_groups[0]["lr"]) == (Adam, 0.001)
    assert "LBFGS cannot train a branch on its own; Adam at 0.001 does until it is kept" in told[0][1]
    owns.follow(own)
    assert own.param_groups[0]["lr"] == 0.001

    bare = nn.Linear(4, 5, bias=False)  # a matrix only: Muon itself can
    assert type(make(host, {"muon": Muon(matrices)})[2].like(bare, place)) is Muon


class Awkward(SGD):
    """A user's own, made in another way."""

    def __init__(self, model: nn.Module, strength: float) -> None:
        super().__init__(model.parameters(), lr=strength)


def test_a_class_that_is_made_in_another_way_is_told(host: Any) -> None:
    place, kernel, owns, told = make(host, {"main": Awkward(host, 0.1)})
    assert type(owns.like(kernel, place)) is Adam
    assert "Awkward cannot train a branch on its own" in told[0][1]


def test_a_frozen_place_gets_adam(host: Any) -> None:
    place, kernel, owns, told = make(host, {"main": SGD(host.embed.parameters(), lr=0.1)})
    assert type(owns.like(kernel, place)) is Adam
    assert told == []


def test_only_lbfgs_needs_a_closure() -> None:
    assert {name for name in OPTIMIZERS if needs_closure(getattr(torch.optim, name))} == {"LBFGS"}


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("kind", [LBFGS, SGD])
def test_a_branch_sees_the_gradients_of_the_last_evaluation(
    host: Any, kind: Callable[..., Optimizer], by_name: bool
) -> None:
    kernel, x = nn.Linear(4, 5), torch.randn(16, 4)
    optimizer = kind(host.parameters(), lr=0.1)
    last: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()  # knows nothing of the kernel
        loss = (host(x) + kernel(x)).square().mean()
        last.append(torch.autograd.grad(loss, kernel.weight, retain_graph=True)[0])
        loss.backward()
        return loss

    handle = before_closures(optimizer, kernel.zero_grad)
    step: Any = optimizer.step
    loss = step(closure=closure) if by_name else step(closure)
    assert loss.requires_grad
    assert kernel.weight.grad is not None
    assert torch.equal(kernel.weight.grad, last[-1])
    assert len(last) > 1 or kind is SGD
    handle.remove()
    step(closure)
    assert not torch.equal(kernel.weight.grad, last[-1])
    if kind is SGD:
        optimizer.step()  # without one it is as it was
