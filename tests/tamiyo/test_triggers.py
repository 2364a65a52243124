"""When a decision is due."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.config import Schedule
from esper.tamiyo.triggers import Trigger


def falling(step: int) -> float:
    return 10.0 - 0.01 * step


def asked(trigger: Trigger, steps: int, loss: object = falling) -> dict[int, str]:
    """Every step at which a decision was due, with the reason."""
    told = {step: trigger.reason(step, loss(step)) for step in range(1, steps + 1)}  # type: ignore[operator]
    return {step: why for step, why in told.items() if why is not None}


@given(st.integers(20, 5000), st.integers(1, 12), st.floats(0, 0.5), st.floats(0.5, 1))
def test_decisions_are_spread_evenly_between_warmup_and_stop(
    steps: int, count: int, warmup: float, stop: float
) -> None:
    trigger = Trigger(Schedule(warmup=warmup, stop=stop), steps, count)
    assert len(trigger.due) == count
    assert trigger.due[0] == math.ceil(warmup * steps)
    assert trigger.due[-1] <= max(stop * steps, trigger.warmup)
    gaps = np.diff(trigger.due)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_a_falling_loss_gets_the_schedule_and_nothing_else() -> None:
    trigger = Trigger(Schedule(warmup=0.1, stop=0.9), 1000, 4)
    due = list(trigger.due)
    assert due == [100, 300, 500, 700]
    assert asked(trigger, 1000) == dict.fromkeys(due, "scheduled")


def test_a_step_that_was_missed_is_made_up_for_once() -> None:
    trigger = Trigger(Schedule(warmup=0.1), 1000, 2)
    assert trigger.reason(450, 1.0) == "scheduled"
    assert trigger.reason(451, 1.0) is None


def test_a_stall_brings_the_next_decision_forward_and_never_adds_one() -> None:
    schedule = Schedule(warmup=0.1, stop=0.9, plateau_window=20)
    trigger = Trigger(schedule, 1000, 3)
    told = asked(trigger, 1000, loss=lambda step: 1.0)
    assert len(told) == 3
    assert set(told.values()) == {"scheduled", "the loss stalls"}
    assert min(told) == 100
    assert max(told) < 366 + 267, "stalling, all were made before their time"
    assert (
        "the loss stalls"
        not in asked(
            Trigger(schedule.model_copy(update={"plateau": False}), 1000, 3), 1000, lambda step: 1.0
        ).values()
    )


def test_without_steps_only_a_stall_grows_and_not_before_it_can_be_judged() -> None:
    schedule = Schedule(plateau_window=20)
    assert asked(Trigger(schedule, None, 4), 500) == {}
    told = asked(Trigger(schedule, None, 4), 500, loss=lambda step: 1.0)
    assert min(told) >= 40
    assert set(told.values()) == {"the loss stalls"}
    assert min(np.diff(sorted(told))) >= 40, "after each the window fills afresh"


def test_nothing_is_due_before_warmup_or_after_the_stop() -> None:
    trigger = Trigger(Schedule(warmup=0.5, stop=0.6, plateau_window=4), 1000, 5)
    told = asked(trigger, 1000, loss=lambda step: 1.0)
    assert told
    assert 500 <= min(told) <= max(told) <= 600


@pytest.mark.parametrize("slope", [-1.0, 0.0, 1.0])
def test_a_stall_is_no_fall_beyond_chance(slope: float) -> None:
    trigger = Trigger(Schedule(plateau_window=20), None, 1)
    rng = np.random.default_rng(0)
    trigger.losses.extend(slope * step + 0.1 * rng.normal() for step in range(40))
    assert trigger.stalled() is (slope >= 0)


def test_a_loss_that_is_not_a_number_counts_as_a_stall_not_as_progress() -> None:
    trigger = Trigger(Schedule(plateau_window=4), None, 1)
    trigger.losses.extend([1.0] * 7 + [math.nan])
    assert trigger.stalled()


def test_a_refused_decision_gets_another_chance_between_two_that_are_due() -> None:
    trigger = Trigger(Schedule(warmup=0.1, stop=0.9), 1000, 4)
    trigger.reason(100, 1.0)
    trigger.again(120)
    assert trigger.due == [220, 300, 500, 700]
    trigger.again(290)
    assert trigger.due == [220, 300, 500, 700], "one is due before the retry would be"
    last = Trigger(Schedule(warmup=0.1, stop=0.9), 1000, 1)
    last.reason(100, 1.0)
    last.again(120)
    assert last.due == [], "a lone decision has no interval to halve"


def test_no_chance_is_given_past_the_stop() -> None:
    trigger = Trigger(Schedule(warmup=0.1, stop=0.9), 1000, 2)
    trigger.due = []
    trigger.again(890)
    assert trigger.due == []


@given(st.integers(1, 400))
def test_a_resumed_trigger_goes_on_alike(cut: int) -> None:
    schedule = Schedule(plateau_window=16)

    def loss(step: int) -> float:
        return max(1.0, 3.0 - 0.02 * step)

    whole, half = Trigger(schedule, 500, 5), Trigger(schedule, 500, 5)
    expected = asked(whole, 500, loss)
    first = asked(half, cut, loss)
    resumed = Trigger(schedule, 500, 5)
    resumed.load_state_dict(half.state_dict())
    rest = {step: why for step in range(cut + 1, 501) if (why := resumed.reason(step, loss(step)))}
    assert first | rest == expected
