from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.intervals import mean_of, paired_difference


def test_mean_and_standard_error_agree_with_scipy() -> None:
    values = np.random.default_rng(0).normal(3, 2, 17).tolist()
    found = mean_of(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sem == pytest.approx(stats.sem(values))


def test_paired_interval_agrees_with_scipy() -> None:
    random = np.random.default_rng(1)
    b = random.normal(size=12)
    a = b + random.normal(0.4, 0.3, 12)
    found = paired_difference(a.tolist(), b.tolist())
    known = stats.t.interval(0.95, 11, loc=(a - b).mean(), scale=stats.sem(a - b))
    assert (found.low, found.high) == pytest.approx(known)
    assert found.mean == pytest.approx(float((a - b).mean()))


def test_one_seed_has_no_interval() -> None:
    found = paired_difference([0.9], [0.8])
    assert (found.low, found.high) == (None, None)
    assert found.show() == "+0.1000"


def test_a_diverged_run_stays_in_the_mean() -> None:
    assert math.isnan(mean_of([1.0, math.nan]).mean)
    with pytest.raises(ValueError, match="no values"):
        mean_of([])


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])
