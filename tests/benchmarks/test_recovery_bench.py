"""The recovery bench in its smoke form: real processes, real kills."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import recovery


@pytest.mark.slow
def test_a_quick_run_is_killed_and_comes_back(tmp_path: Path) -> None:
    assert recovery.main(["--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "recovery.json").read_text())
    assert record["small"]["equal"] is True
    assert record["small"]["killed"] == 3
    assert record["large"].keys() >= {"seconds to step", "stall in steps", "share"}
