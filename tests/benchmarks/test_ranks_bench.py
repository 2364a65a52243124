"""The bench of processes in its smoke form: one is killed, one stopped for good, one delayed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import rank_gradients, ranks


@pytest.mark.slow
def test_a_quick_run_is_disturbed_and_stays_the_same_in_all_processes(tmp_path: Path) -> None:
    assert ranks.main(["--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "ranks.json").read_text())
    disturbed, gradients = record["disturbed"], record["gradients"]
    assert disturbed["counts"] == {"killed": 1, "stopped for good": 1, "delayed": 1}
    assert disturbed["lives"] == 3
    assert disturbed["unexplained"] == []
    assert (disturbed["different"], disturbed["failed"], disturbed["hangs"]) == (0, 0, 0)
    assert disturbed["equal"] is True
    assert disturbed["events"]["kept"] >= 1
    assert disturbed["events"]["kept"] + disturbed["events"]["culled"] >= 5
    assert gradients.keys() == rank_gradients.options().keys()
    for kinds in gradients.values():
        assert all(set(whens) == set(rank_gradients.WHENS) for whens in kinds.values())
        assert max(kinds["float64"].values()) < 1e-12
        assert max(kinds["float32"].values()) < 2e-6  # rounding, which another processor may do another way


def test_disturbances_are_spread_and_one_that_starts_follows_an_end() -> None:
    made = ranks.plan(560, 10, 2, 2, 8)
    assert len(made) == 22
    assert {one.rank for one in made if one.kind == "killed"} == {0, 1}
    steps = [one.step for one in made if one.step]
    assert steps == sorted(steps)
    for before, one in itertools.pairwise(made):
        assert one.step or before.kind in ("killed", "stopped for good")
