"""The overhead bench adds up its parts, and runs in its smoke form."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks import overhead


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_time_inside_an_inner_part_is_not_the_outer_ones() -> None:
    clock = overhead.Clock()
    inner: Callable[[], None] = clock.around("inner", lambda: spin(0.02))

    def work() -> None:
        spin(0.01)
        inner()

    clock.around("outer", work)()
    assert clock.parts["inner"] == pytest.approx(0.02, rel=0.5)
    assert clock.parts["outer"] == pytest.approx(0.01, rel=0.5)


def test_steps_are_split_into_the_hosts_own_part_and_what_a_seed_added() -> None:
    own = {(1, "dormant"): [1.0, 1.0, 1.0], (1, "exposed"): [1.5, 1.5], (1, "tapped"): [1.1]}
    found = overhead.summed(own, overhead.Clock())
    assert found["host"] == pytest.approx(6.0)
    assert found["parts"]["kernels"] == pytest.approx(1.0)
    assert found["parts"]["incubation"] == pytest.approx(0.1)
    assert found["overhead"] == pytest.approx(1.1 / 6)


def test_dormant_arms_take_the_same_steps() -> None:
    torch.set_num_threads(1)
    taken = overhead.compared("MLP", 2)
    assert tuple(taken) == overhead.ARMS
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in taken.values())


@pytest.mark.parametrize("kind", overhead.KINDS)
def test_calls_where_nothing_is_due_are_timed_one_by_one(kind: str) -> None:
    taken = overhead.call(kind, 5)
    assert len(taken) == 5
    assert min(taken) > 0


def test_an_arm_is_slower_only_where_the_interval_of_its_median_says_so() -> None:
    arms = {"bare": [1.0] * 100, "wrapped": [0.9] * 45 + [1.2] * 55, "slow": [0.9] * 10 + [1.2] * 90}
    assert overhead.least(arms, "wrapped") == 0.9
    assert overhead.least(arms, "slow") == 1.2


def test_digits_are_put_somewhere_into_larger_images() -> None:
    part = torch.ones(2, 1, 8, 8), torch.tensor([3, 4])
    images, labels = overhead.placed(part, seed=0, copies=3)
    assert images.shape == (6, 3, 32, 32)
    assert labels.tolist() == [3, 4, 3, 4, 3, 4]
    assert images.sum(dim=(1, 2, 3)).tolist() == [3 * overhead.DIGIT**2] * 6


@pytest.mark.slow
def test_a_short_run_grows_in_every_part() -> None:
    torch.set_num_threads(1)
    found = overhead.whole(0, 60)
    assert set(found["parts"]) == set(overhead.PARTS)
    assert found["races"] >= 1
    assert found["overhead"] == pytest.approx(sum(found["parts"].values()) / found["host"])
