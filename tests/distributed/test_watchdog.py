"""A silent process is given up, a slow one is not, and nobody dies of a goodbye: in real processes."""

from __future__ import annotations

from typing import Any

import pytest

from esper.distributed.watchdog import EXIT
from tests.distributed.forks import scenarios
from tests.distributed.watchdog_worker import DEADLINE, STEPS, STOPPED

pytestmark = pytest.mark.slow
SLACK = 4.0  # seconds: a pulse, and a busy machine


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return scenarios("tests.distributed.watchdog_worker", tmp_path_factory.mktemp("watchdog"))


def test_a_stopped_process_ends_the_other_out_of_its_backward_pass(found: dict[str, Any]) -> None:
    silent = found["silent"]
    assert silent["code"] == EXIT
    assert 0.9 * DEADLINE - 1.0 < silent["took"] < DEADLINE + SLACK
    assert f"in {STOPPED}\n" in silent["said"]
    assert f"out {STOPPED}\n" not in silent["said"]
    assert "has been silent for" in silent["said"]
    assert "--resume auto" in silent["said"]


def test_a_short_stop_harms_nothing(found: dict[str, Any]) -> None:
    short = found["short"]
    assert short["codes"] == [0, 0]
    assert all(f"out {STEPS - 1}\n" in said for said in short["said"])
    first, second = (said.partition("weights ")[2] for said in short["said"])
    assert first
    assert first == second
    assert not any("silent" in said for said in short["said"])


def test_a_process_that_leaves_without_finish_does_not_end_the_other(found: dict[str, Any]) -> None:
    left = found["left"]
    assert left["codes"] == [0, 0]
    assert left["took"] > DEADLINE
    assert left["said"][0].endswith("still here\n")


@pytest.mark.parametrize("how", ["closed", "unclosed"])
def test_pairs_end_without_an_abort(found: dict[str, Any], how: str) -> None:
    for pair in found[how]:
        assert pair["codes"] == [0, 0]
        assert pair["said"] == ["done\n", "done\n"]
