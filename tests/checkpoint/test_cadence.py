"""How often to save, and what to keep."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.checkpoint.cadence import SHARE, Cadence
from esper.checkpoint.format.manifest import Manifest, name_of
from esper.checkpoint.retention import Retention
from esper.errors import ConfigError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@given(
    st.floats(0.001, 5), st.floats(0.001, 0.5), st.lists(st.floats(0.5, 2), min_size=1), st.floats(60, 1e6)
)
def test_checkpoints_take_their_share_and_no_more(
    cost: float, step: float, jitter: list[float], failures: float
) -> None:
    clock = Clock()
    cadence = Cadence(None, failures, size=int(cost * 1e8), clock=clock)
    spent = 0.0
    for number in range(2000):
        clock.now += step
        if cadence.due(number):
            price = cost * jitter[number % len(jitter)]
            cadence.saved(number)
            cadence.measured(price)
            spent += price
            assert spent <= SHARE * clock.now + 2 * cost  # the last one may cost more than it was thought to


def test_the_interval_is_youngs_where_the_share_allows_it() -> None:
    cadence = Cadence(None, 3600, size=0, clock=Clock())
    cadence.measured(0.02)
    assert cadence.interval == pytest.approx(12.0)  # √(2 · 0.02 · 3600)
    assert "one every 12 s takes 0.17% of the run; a failure loses 6.02 s on average" in cadence.told()
    cadence = Cadence(None, 3600, size=0, clock=Clock())
    cadence.measured(10.0)
    assert cadence.interval == pytest.approx(10 / SHARE)


def test_steps_and_seconds_are_kept_to() -> None:
    clock = Clock()
    steps, seconds = Cadence(3, 1, 0, clock), Cadence(timedelta(seconds=5), 1, 0, clock)
    assert [step for step in range(1, 8) if steps.due(step) and not steps.saved(step)] == [3, 6]
    assert "a failure loses 1.5 steps on average" in steps.told()
    clock.now = 4.9
    assert not seconds.due(100)
    clock.now = 5.0
    assert seconds.due(100)
    for every in (0, -1, timedelta(0)):
        with pytest.raises(ConfigError, match="must be positive"):
            Cadence(every, 1, 0)


def test_a_run_that_is_killed_soon_has_a_checkpoint_by_then() -> None:
    clock = Clock()
    cadence = Cadence(None, 3600, size=0, clock=clock)
    saved = []
    for number in range(1, 2000):
        clock.now = 100 + number * 0.01  # the model took a while to build
        if cadence.due(number):
            saved.append(clock.now - 100.01)
            cadence.saved(number)
            cadence.measured(0.001)
    assert saved[0] == pytest.approx(0.25, abs=0.02)
    assert all(second <= 2 * first + 0.05 or second - first < 3 for first, second in pairwise(saved))


def test_growth_is_a_milestone_where_no_number_of_steps_is_given() -> None:
    free, fixed = Cadence(None, 1, 0), Cadence(5, 1, 0)
    assert [free.grown(size) for size in (0, 1, 1, 0)] == [False, True, False, True]
    assert not fixed.grown(1)
    assert Cadence(5, 1, 0, milestones=True).grown(1)


def manifests(**losses: float | None) -> dict[str, Manifest]:
    made = {}
    for key, loss in losses.items():
        step = int(key[1:])
        made[name_of(step)] = Manifest(step, 0.0, {}, {} if loss is None else {"loss": loss}, {})
    return made


def test_the_newest_sound_ones_and_the_best_stay() -> None:
    sound = manifests(s1=0.1, s2=0.5, s3=0.1, s4=0.9, s6=None)
    names = [name_of(step) for step in range(1, 8)]  # 5 and 7 are damaged
    rule = Retention(2, ("loss", "min"))
    assert rule.superfluous(names, sound) == [name_of(1), name_of(2)]  # of equals the newest; 5 is young
    assert Retention(1).superfluous(names, sound) == names[:5]
    assert Retention(1, ("accuracy", "max")).superfluous(names, sound) == names[:5]
    assert Retention(None).superfluous(names, sound) == []
    assert Retention(1).superfluous(names, {}) == []  # nothing is known to be sound: nothing goes


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 4))
def test_the_newest_sound_one_is_never_deleted(whole: list[bool], keep: int) -> None:
    names = [name_of(step) for step in range(len(whole))]
    sound = {name: m for name, m, good in zip(names, manifests(**{f"s{i}": 1.0 for i in range(len(whole))}).values(), whole, strict=True) if good}  # fmt: skip # noqa: E501
    left = set(names) - set(Retention(keep).superfluous(names, sound))
    assert len(left & set(sound)) >= min(keep, len(sound))
    if sound:
        assert max(sound) in left


def test_settings_that_would_keep_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        Retention(0)
    with pytest.raises(ConfigError, match="'min' or 'max'"):
        Retention(1, ("loss", "least"))  # type: ignore[arg-type]
