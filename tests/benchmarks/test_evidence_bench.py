"""The evidence bench draws nulls whose mean is nought, and would notice a test that is not honest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evidence
from benchmarks.nulls import BOTH, NULLS
from esper.kasmina.evidence import significance


@pytest.mark.parametrize("name", [*NULLS, *BOTH])
def test_the_mean_of_every_null_is_nought(name: str) -> None:
    values = evidence.known(name).draw(np.random.default_rng(0), 2000, 64)
    assert values.shape == (2000, 64)
    means = values.mean(axis=1)
    assert abs(means.mean()) <= 4 * means.std() / np.sqrt(len(means))


def test_a_cell_counts_what_the_gate_would_pass() -> None:
    job = evidence.Job("exponential, rare losses", 128, 2000, 0)
    found, plain = evidence.count(job)
    rng = np.random.default_rng([0, 128, 2000, sum(job.null.encode()), 0])
    values = NULLS[job.null].draw(rng, 2000, 128)
    each = [significance.p_value(row) for row in values]
    assert found.tolist() == [sum(p is not None and p <= alpha for p in each) for alpha in evidence.ALPHAS]
    assert plain[1] > found[1]


def test_a_test_that_is_not_honest_misses_the_promise() -> None:
    """Plain Student's t beside the gate's p-value, on the same probes."""
    jobs = [evidence.Job(name, 64, 4000, 0) for name in ("lognormal, rare losses", "8 identical rows")]
    counts = [evidence.count(job) for job in jobs]
    assert sum(cell.missed for cell in evidence.cells(jobs, counts)) == 0
    swapped = [(plain, found) for found, plain in counts]
    assert sum(cell.missed for cell in evidence.cells(jobs, swapped)) == 8


def test_what_cannot_hold_is_not_promised() -> None:
    jobs = [evidence.Job("N4: .07 lose .14", n, 500, 0) for n in (32, 64, 128)]
    cells = evidence.cells(jobs, [evidence.count(job) for job in jobs])
    assert [cell.promised for cell in cells] == [
        (False,) * 4,
        (True, True, False, False),
        (True,) * 4,
    ]


def test_a_quick_run_prints_writes_and_judges_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evidence.main(["--quick", "--seeds", "1", "--jobs", "0", "--out", str(tmp_path)]) == 0
    assert "a quick run judges nothing" in capsys.readouterr().out
    record = json.loads((tmp_path / "evidence.json").read_text())
    assert record["fewest values"]["0.0002"] == [53, 20]
    assert len(record["promises"]) == 2
