"""The forge's bench runs in its smoke form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import forge


@pytest.mark.slow
def test_a_quick_run_prints_writes_and_judges_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert forge.main(["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert "a quick run judges nothing" in capsys.readouterr().out
    record = json.loads((tmp_path / "forge.json").read_text())
    assert len(record["submit"]) == 20
    assert all(found["next"] and found["error"] for found in record["hostile"].values())


def test_a_percentile_is_a_measured_value() -> None:
    assert forge.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert forge.percentile(list(range(1, 101)), 99) == 99
    assert forge.percentile([5.0], 99) == 5.0
