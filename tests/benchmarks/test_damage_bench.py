"""The damage bench at a tenth of its cases: all of them are refused, and the bench can tell if one is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import damage
from benchmarks.artefacts import Artefact, artefacts


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Artefact]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ESPER_KERNEL_KEY", raising=False)
        yield artefacts(tmp_path_factory.mktemp("kept"))


@pytest.mark.slow
def test_a_thousand_cases_are_refused(kept: list[Artefact]) -> None:
    tally = damage.Tally()
    damage.inflict(kept, seed=0, cases=1000, tally=tally)
    assert tally.passed == []
    assert tally.refused.total() == tally.cases.total() == 1000
    assert len(tally.cases) == len(kept) * len(damage.DAMAGES) - 2  # a saved model has no name in it


@pytest.mark.slow
def test_what_is_not_refused_is_counted(kept: list[Artefact]) -> None:
    gullible = replace(kept[0], accepted=lambda: "it was loaded")
    tally = damage.Tally()
    damage.inflict([gullible], seed=0, cases=8, tally=tally)
    assert tally.refused.total() == 0
    assert all(line.endswith("it was loaded") for line in tally.passed)
    with pytest.raises(AssertionError, match="refused without damage"):
        damage.inflict([replace(kept[0], accepted=lambda: None)], seed=0, cases=1, tally=tally)


@pytest.mark.slow
def test_the_way_back_past_a_damaged_checkpoint_is_timed(tmp_path: Path) -> None:
    seconds = damage.steps_back(tmp_path, wide=8)
    assert len(seconds) == 8
    assert all(value > 0 for value in seconds.values())
