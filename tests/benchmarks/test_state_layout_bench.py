"""The state-layout bench compares arms that compute the same, and runs in its smoke form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import state_layout


def test_every_arm_does_the_same_work() -> None:
    found = []
    for arm in state_layout.ARMS:
        step, rows = state_layout.build(arm, 5)
        for _ in range(3):
            step()
        found.append(rows())
    for rows in found[1:]:
        for row, first in zip(rows, found[0], strict=True):
            assert row == pytest.approx(first, rel=1e-5)


def test_a_quick_run_writes_and_judges_nothing(tmp_path: Path) -> None:
    line = ["--quick", "--seeds", "1", "--arms", "objects,parallel tensors", "--out", str(tmp_path)]
    assert state_layout.main(line) == 0
    record = json.loads((tmp_path / "state-layout.json").read_text())
    assert record["medians"].keys() == {"4", "64"}
    assert record["promises"][0]["measured"] is None
