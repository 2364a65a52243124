"""Runs of two processes go on bit for bit after a kill, from one checkpoint, and in another number."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.forks import scenarios
from tests.distributed.resuming_worker import BATCH, EVERY, ROWS, STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return scenarios("tests.distributed.resuming_worker", tmp_path_factory.mktemp("resuming"))


def words(said: str, first: str) -> list[str]:
    """Return what follows a word, line by line."""
    return [line.partition(" ")[2] for line in said.splitlines() if line.startswith(f"{first} ")]


def last_words(run: dict[str, Any]) -> list[list[str]]:
    """Return the digest every process ended with."""
    ends = [words(said, "end") for said in run["said"]]
    assert all(len(end) == 1 for end in ends), run["said"]
    return ends


@pytest.mark.parametrize("buffers", ["synced", "own"])
@pytest.mark.parametrize("how", ["loop", "trainer"])
def test_a_killed_run_goes_on_bit_for_bit(found: dict[str, Any], how: str, buffers: str) -> None:
    one = found[f"killed {how} {buffers}"]
    rank, step = one["kill"]
    assert one["whole"]["codes"] == [0, 0]
    assert one["cut"]["codes"][rank] == -9
    assert one["cut"]["codes"][1 - rank] == 1, "the other one was told"
    assert "ProcessError" in one["cut"]["said"][1 - rank]
    assert one["again"]["codes"] == [0, 0]
    for said in one["again"]["said"]:
        (resumed,) = map(int, words(said, "resumed"))
        assert step - 2 * EVERY <= resumed < step  # the newest one may not have been written by then
        assert resumed % EVERY == 0
        assert words(said, "steps") == [f"{STEPS} took {STEPS - resumed}"]
    assert "True" in words(one["whole"]["said"][0], "outcome"), "nothing grew"
    assert last_words(one["again"]) == last_words(one["whole"])


def test_buffers_of_their_own_are_each_process_s(found: dict[str, Any]) -> None:
    first, second = last_words(found["killed loop own"]["again"])
    assert first != second


@pytest.mark.parametrize(("name", "before", "after"), [("fewer", 2, 1), ("more", 1, 2)])
def test_another_number_of_processes_goes_on_at_the_same_batch(
    found: dict[str, Any], name: str, before: int, after: int
) -> None:
    run = found[name]["again"]
    assert run["codes"] == [0] * after
    batches = ROWS // BATCH
    resumed = int(words(run["said"][0], "resumed")[0])
    assert resumed in (EVERY, 2 * EVERY)  # the kill may have come before the newest one was written
    for said in run["said"]:
        assert words(said, "resumed") == [str(resumed)]
        assert words(said, "position") == [f"{resumed // batches} {resumed % batches}"]
        assert words(said, "steps") == [f"{STEPS} took {STEPS - resumed}"]
        assert any(f"there were {before} processes and are {after}" in one for one in words(said, "warning"))
        assert "True" in words(said, "outcome")


def test_all_step_over_a_damaged_checkpoint_together(found: dict[str, Any]) -> None:
    run = found["damaged"]["again"]
    assert run["codes"] == [0, 0]
    for said in run["said"]:
        assert words(said, "resumed") == [str(EVERY)]
        assert any("a damaged checkpoint was passed over" in one for one in words(said, "warning"))
    assert last_words(run) == last_words(found["damaged"]["whole"])


@pytest.mark.parametrize("name", ["silent 0", "silent 1", "damaged 0", "damaged 1", "empty 1"])
def test_all_refuse_what_one_cannot_read(found: dict[str, Any], name: str) -> None:
    run = found["one cannot"][name]
    refused = [words(said, "refused") for said in run["said"]]
    assert all(len(one) == 1 for one in refused), run["said"]
    why = {"silent": "does not answer", "damaged": "SHA-256", "empty": "No such file"}[name[:-2]]
    assert why in refused[int(name[-1])][0]
    assert why not in refused[1 - int(name[-1])][0]
    assert run["took"] < 30.0
    assert run["left"] == [f"step-{step:08}" for step in (EVERY, 2 * EVERY)]
