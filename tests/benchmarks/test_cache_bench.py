"""The cache bench in its smoke form, and the bound it prints beside the hit rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cache


def test_a_quick_run_writes_and_judges_nothing(tmp_path: Path) -> None:
    assert cache.main(["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "cache.json").read_text())
    assert record["crowd_loads"] == [1]
    assert record["hit_rates"].keys() == {"16", "32", "64", "128", "256"}
    assert record["promises"][2]["kept"] is True


def test_a_cache_of_everything_does_as_well_as_one_that_knows_the_law() -> None:
    asked = cache.trace(0, 5000)
    assert cache.hit_rate(cache.KERNELS, asked) == 1 - len(set(asked)) / 5000
    assert cache.most_popular_kept(cache.KERNELS, 5000) == pytest.approx(1 - len(set(asked)) / 5000, abs=0.01)
    assert cache.most_popular_kept(1, 5000) == pytest.approx(cache.law()[0], abs=0.001)
