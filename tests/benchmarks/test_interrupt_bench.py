"""The interrupt bench in its smoke form: every stage is cut off in, with loaders of 0 and 2 workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import interrupt


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_cut_off_in_any_stage_ends_as_if_it_never_was(tmp_path: Path) -> None:
    assert interrupt.main(["--quick", "--out", str(tmp_path)]) == 0
    figures = json.loads((tmp_path / "interrupt.json").read_text())
    record, governed = figures["workers"], figures["governed"]
    assert "ROLLED_BACK" in {stage for stages in governed["stages"].values() for stage in stages}
    assert governed["different"] == {}
    assert governed["disturbed"] == []
    for found in record.values():
        assert set(interrupt.STAGES) == {stage for stages in found["stages"].values() for stage in stages}
        assert found["different"] == {}
        assert found["disturbed"] == []
    assert record["2"]["equal"] is True
    assert record["2"]["kills"] == 1
