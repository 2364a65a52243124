"""The recovery bench in its smoke form: real processes, real kills, some of them aimed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import recovery
from benchmarks.lives import MOMENTS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_quick_run_is_killed_in_every_moment_and_comes_back(tmp_path: Path) -> None:
    assert recovery.main(["--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "recovery.json").read_text())
    assert record["small"]["equal"] is True
    assert record["small"]["failed"] == 0
    assert record["small"]["killed"] >= 10
    assert set(record["small"]["died"]) >= set(MOMENTS)
    assert record["small"]["grown"] == ["WidenPlan", "GraftPlan"]
    assert record["large"].keys() >= {"seconds to step", "stall in steps", "share"}
