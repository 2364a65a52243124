"""The fuzz bench counts what it draws, and a failure is told with the smallest graph that shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from benchmarks import fuzz
from esper.contracts import Signature
from esper.testing.graphs import Spoilt


def test_a_tenth_of_one_seed_holds() -> None:
    tally = fuzz.run_seed(1, share=10)
    assert tally.failures == []
    assert tally.counts["valid"] == tally.counts["sound"] == fuzz.VALID // 10
    assert tally.counts["spoilt"] == tally.counts["refused by name"] == fuzz.SPOILT // 10
    assert tally.counts["nonsense"] == fuzz.NONSENSE // 10


def test_a_failure_is_shrunk_and_told() -> None:
    """A spoilt graph that is none: whoever accepts it is told so."""
    sound = Spoilt("{}", Signature("vector", "parallel", 1, 1), 1, "nobody", "lacks")
    tally = fuzz.Tally(3)
    fuzz.explore(tally, 5, st.just(sound), fuzz.spoilt)
    assert "seed 3: AssertionError" in tally.failures[0]
    assert "does not name 'nobody'" in tally.failures[0]


@pytest.mark.slow
def test_the_quick_form_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--quick", "--jobs", "0", "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["failures"] == []
