"""What is forecast of a rate is what a real optimizer goes through, and nobody notices that it was asked."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim import lr_scheduler as schedule

from esper.tolaria.growth.early.rates import forecast

STEPS, EPOCH = 120, 10
Make = Callable[[Optimizer, int], Any]  # of an optimizer and the moves it will make

ALONE: dict[str, Make] = {
    "LambdaLR": lambda o, n: schedule.LambdaLR(o, lambda at: 1 / (1 + at)),
    "MultiplicativeLR": lambda o, n: schedule.MultiplicativeLR(o, lambda at: 0.9),
    "StepLR": lambda o, n: schedule.StepLR(o, max(n // 4, 1)),
    "MultiStepLR": lambda o, n: schedule.MultiStepLR(o, [n // 3, 2 * n // 3]),
    "ConstantLR": lambda o, n: schedule.ConstantLR(o, 0.5, n),
    "LinearLR": lambda o, n: schedule.LinearLR(o, 0.1, total_iters=n),
    "ExponentialLR": lambda o, n: schedule.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o, n: schedule.PolynomialLR(o, n, 2.0),
    "CosineAnnealingLR": lambda o, n: schedule.CosineAnnealingLR(o, n),
    "CosineAnnealingWarmRestarts": lambda o, n: schedule.CosineAnnealingWarmRestarts(o, max(n // 3, 1)),
    "CyclicLR": lambda o, n: schedule.CyclicLR(o, 0.01, 0.1, max(n // 4, 1)),
    "OneCycleLR": lambda o, n: schedule.OneCycleLR(o, 0.1, total_steps=n),
}
JOINED: dict[str, Make] = {
    "SequentialLR": lambda o, n: schedule.SequentialLR(
        o,
        [
            schedule.LinearLR(o, 0.1, total_iters=max(n // 5, 1)),
            schedule.CosineAnnealingLR(o, n - max(n // 5, 1)),
        ],
        [max(n // 5, 1)],
    ),
    "ChainedScheduler": lambda o, n: schedule.ChainedScheduler(
        [schedule.LinearLR(o, 0.1, total_iters=max(n // 5, 1)), schedule.CosineAnnealingLR(o, n)], o
    ),
}
EVERY = {**ALONE, **JOINED}


def optimizer_of(kind: type[Optimizer] = SGD) -> Optimizer:
    options = {"momentum": 0.9} if kind is SGD else {}
    return kind([nn.Parameter(torch.ones(3))], lr=0.1, **options)  # type: ignore[call-arg]


def lived(optimizer: Optimizer, scheduler: Any, first: int, every: int, last: int = STEPS) -> list[float]:
    """Train over a range of steps; returns the rate that each was made with."""
    rates = []
    for step in range(first, last):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        (parameter,) = optimizer.param_groups[0]["params"]
        optimizer.zero_grad()
        (parameter**2).sum().backward()
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return rates


def facts(optimizer: Optimizer, scheduler: Any) -> Any:
    state = scheduler.state_dict()
    return copy.deepcopy([optimizer.state_dict(), {k: v for k, v in state.items() if k != "_schedulers"}])


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize("done", [0, 35])
@pytest.mark.parametrize("name", EVERY)
def test_by_the_step_the_forecast_is_what_happens(name: str, done: int) -> None:
    optimizer = optimizer_of()
    scheduler = EVERY[name](optimizer, STEPS)
    lived(optimizer, scheduler, 0, 1, done)
    seen = forecast([scheduler], optimizer, STEPS, done)
    assert seen is not None
    assert len(seen) == STEPS
    assert seen[done:] == lived(optimizer, scheduler, done, 1)


@pytest.mark.parametrize("done", [0, 40])
@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("LambdaLR", "MultiplicativeLR")])
def test_by_the_epoch_it_is_too(name: str, done: int) -> None:
    """Before it has moved a scheduler's own length tells, where it has one; afterwards its pace is seen."""
    if done == 0 and name in (
        "StepLR",
        "ExponentialLR",
        "MultiStepLR",
        "CyclicLR",
        "CosineAnnealingWarmRestarts",
    ):
        pytest.skip("says nothing of its length")
    optimizer = optimizer_of()
    scheduler = EVERY[name](optimizer, STEPS // EPOCH)
    lived(optimizer, scheduler, 0, EPOCH, done)
    seen = forecast([scheduler], optimizer, STEPS, done)
    assert seen is not None
    assert seen[done:] == lived(optimizer, scheduler, done, EPOCH)


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("name", EVERY)
def test_neither_scheduler_nor_optimizer_knows_that_it_was_asked(name: str, kind: type[Optimizer]) -> None:
    optimizer = optimizer_of(kind)
    scheduler = EVERY[name](optimizer, STEPS)
    asked, twin = [], optimizer_of(kind)
    other = EVERY[name](twin, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(STEPS):
            if step % 40 in (0, 7):
                before = facts(optimizer, scheduler)
                keys = [set(vars(one)) for one in (optimizer, scheduler)]
                random = torch.random.get_rng_state()
                forecast([scheduler], optimizer, STEPS, step)
                assert same(facts(optimizer, scheduler), before)
                assert [set(vars(one)) for one in (optimizer, scheduler)] == keys
                assert torch.equal(torch.random.get_rng_state(), random)
            asked += lived(optimizer, scheduler, step, 1, step + 1)
    assert asked == lived(twin, other, 0, 1)


@pytest.mark.parametrize("name", EVERY)
def test_nobody_is_warned_before_the_first_step(name: str) -> None:
    optimizer = optimizer_of()
    scheduler = EVERY[name](optimizer, STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forecast([scheduler], optimizer, STEPS, 0) is not None


def test_two_schedulers_of_one_optimizer_move_together() -> None:
    optimizer = optimizer_of()
    both = [schedule.LinearLR(optimizer, 0.1, total_iters=STEPS), schedule.ExponentialLR(optimizer, 0.97)]
    seen = forecast(both, optimizer, STEPS, 0)

    class Both:
        def step(self) -> None:
            for one in both:
                one.step()

    assert seen == lived(optimizer, Both(), 0, 1)


def test_a_scheduler_of_another_optimizer_says_nothing_of_this_one() -> None:
    first, second = optimizer_of(), optimizer_of()
    other = schedule.ExponentialLR(second, 0.5)
    assert forecast([other], first, STEPS, 0) == [1.0] * STEPS


def test_without_a_scheduler_the_rate_stays() -> None:
    assert forecast([], optimizer_of(), STEPS, 0) == [1.0] * STEPS


def test_a_scheduler_that_was_not_given_is_noticed_and_its_rate_is_not_known() -> None:
    optimizer = optimizer_of()
    schedule.CosineAnnealingLR(optimizer, STEPS)
    assert forecast([], optimizer, STEPS, 0) is None


class Custom:
    """Moves the rate in a way of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.99


class Own(schedule.LRScheduler):
    """Follows torch's interface."""

    def get_lr(self) -> list[float]:
        return [group["lr"] * 0.98 for group in self.optimizer.param_groups]


def test_a_rate_that_waits_for_the_loss_or_is_no_scheduler_of_torch_is_not_known() -> None:
    optimizer = optimizer_of()
    assert forecast([schedule.ReduceLROnPlateau(optimizer)], optimizer, STEPS, 0) is None
    assert forecast([Custom(optimizer)], optimizer, STEPS, 0) is None


def test_a_scheduler_of_the_users_own_on_torchs_interface_is_read() -> None:
    optimizer = optimizer_of()
    scheduler = Own(optimizer)
    assert forecast([scheduler], optimizer, STEPS, 0) == lived(optimizer, scheduler, 0, 1)


def test_one_that_holds_what_cannot_be_copied_is_not_known() -> None:
    optimizer = optimizer_of()
    scheduler = Own(optimizer)
    scheduler.lines = (line for line in ())  # type: ignore[attr-defined]
    assert forecast([scheduler], optimizer, STEPS, 0) is None


@pytest.mark.parametrize("name", ["StepLR", "ExponentialLR", "LambdaLR", "CyclicLR"])
def test_one_that_has_not_moved_and_says_nothing_of_its_length_is_not_known(name: str) -> None:
    """Read by the step, a rate that falls by the epoch would be gone before the first one is over."""
    optimizer = optimizer_of()
    scheduler = EVERY[name](optimizer, STEPS // EPOCH)
    assert forecast([scheduler], optimizer, STEPS, 0) is not None
    lived(optimizer, scheduler, 0, EPOCH, 2)
    assert forecast([scheduler], optimizer, STEPS, 2) is None


def test_a_schedule_that_is_over_before_the_run_keeps_its_last_rate() -> None:
    optimizer = optimizer_of()
    scheduler = schedule.OneCycleLR(optimizer, 0.1, total_steps=STEPS // 2 + 10)
    seen = forecast([scheduler], optimizer, STEPS, 0)
    assert seen is not None
    assert len(seen) == STEPS
    assert seen[-1] == seen[STEPS // 2 + 20]


def test_a_model_of_ten_million_weights_is_not_copied() -> None:
    """A forecast holds no copy of the weights: the stand-in has one number per group."""
    optimizer = SGD([nn.Parameter(torch.zeros(10_000_000))], lr=0.1, momentum=0.9)
    scheduler = schedule.CosineAnnealingLR(optimizer, STEPS)
    with torch.profiler.profile(profile_memory=True) as profiler:
        forecast([scheduler], optimizer, STEPS, 0)
    assert max((event.self_cpu_memory_usage for event in profiler.key_averages()), default=0) < 1_000_000
