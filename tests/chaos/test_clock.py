"""The clocks of a process jump for whoever reads them, and only where they were told to."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from esper.chaos import clock


@pytest.fixture
def installed() -> Iterator[None]:
    clock.install()
    yield
    clock.remove()


@pytest.mark.usefixtures("installed")
def test_clocks_jump_and_the_one_that_measures_does_not() -> None:
    wall, steady, fine = time.time(), time.monotonic(), time.perf_counter_ns()
    true = clock.real()
    clock.jump(3600.0)
    assert time.time() - wall >= 3600
    assert 3600 <= time.monotonic() - steady < 3660
    assert time.perf_counter_ns() - fine >= 3600 * 10**9
    assert clock.real() - true < 60
    clock.jump(-7200.0, "time")
    assert time.time() < wall
    assert time.monotonic() - steady >= 3600


def test_a_process_gets_its_clocks_back() -> None:
    own = time.time, time.monotonic, time.perf_counter, time.time_ns
    clock.install()
    clock.jump(100.0)
    clock.remove()
    assert own == (time.time, time.monotonic, time.perf_counter, time.time_ns)
    clock.install()
    try:
        assert time.time() - own[0]() < 60
    finally:
        clock.remove()
