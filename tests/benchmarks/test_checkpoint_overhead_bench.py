"""The bench of what checkpoints cost, in its smoke form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import checkpoint_overhead


@pytest.mark.slow
def test_a_quick_run_measures_what_a_checkpoint_costs(tmp_path: Path) -> None:
    assert checkpoint_overhead.main(["--quick", "--out", str(tmp_path)]) == 0
    (one,) = json.loads((tmp_path / "checkpoint-overhead.json").read_text())["hosts"].values()
    assert one["forced"]["written"] >= checkpoint_overhead.QUICK_PAIRS
    assert 0 < one["cost"] < one["interval"]
    for clock in checkpoint_overhead.CLOCKS:
        middle, low, high = one["forced"][clock]
        assert low < middle < high
    assert one["told"].startswith("a checkpoint costs")
