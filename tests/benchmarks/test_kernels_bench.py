"""The kernels bench shows its own noise, and judges a choice by a measurement that had no part in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import kernels as bench
from esper.blueprints import CATALOGUE


def test_a_quick_run_measures_and_judges_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick", "--seeds", "2", "--arms", "torchscript", "--out", str(tmp_path)]) == 0
    assert "eager again" in capsys.readouterr().out
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert {one["blueprint"] for one in record["subjects"]} == set(CATALOGUE.names()[:2])
    for one in record["subjects"]:
        assert one["wrong"] == {}
        assert set(one["speedups"]) == {"eager", "eager again", "torchscript"}
        assert all(arm in ("eager", "torchscript") for arm in one["chosen"])
        for index, arm in enumerate(one["chosen"]):
            assert one["gained"][index] == one["speedups"][arm][1 - index]


def test_every_place_has_a_blueprint() -> None:
    for signature, _ in bench.PLACES.values():
        assert any(CATALOGUE.get(name).misfit(signature) is None for name in CATALOGUE.names())
