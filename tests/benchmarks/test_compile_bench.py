"""The compile bench measures every build, in this process and in fresh ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import compile as bench
from benchmarks.compile import Built
from esper.blueprints import CATALOGUE


def test_a_quick_run_builds_and_judges_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--quick", "--seeds", "1", "--arms", "eager,torchscript", "--out", str(tmp_path)]) == 0
    assert "a quick run judges nothing" in capsys.readouterr().out
    record = json.loads((tmp_path / "compile.json").read_text())
    assert [(run["blueprint"], run["arm"]) for run in record["runs"]] == [
        (name, arm) for name in CATALOGUE.names()[:2] for arm in ("eager", "torchscript")
    ]
    assert record["summary"]["torchscript"]["failures"] == 0
    assert 0 < record["summary"]["torchscript"]["p50"] <= record["summary"]["torchscript"]["p99"]
    export = next(one for one in record["promises"] if "export" in one["promise"])
    assert export["measured"] is None
    assert not export["kept"]


def test_a_failure_is_counted_not_timed() -> None:
    built = [
        Built("a", "p", "export", 0, cpu=3.0, wall=4.0),
        Built("b", "p", "export", 0, error="CompileError: no"),
    ]
    found = bench.summary(built)
    assert (found["builds"], found["failures"], found["p50"], found["p99"]) == (2, 1, 3.0, 3.0)
    assert bench.promises(built, ["export"])[-1].measured == 1
    assert bench.summary(built[1:])["p50"] is None


@pytest.mark.parametrize(("share", "value"), [(0.5, 51), (0.99, 100), (1.0, 100), (0.0, 1)])
def test_percentiles_are_values_that_were_measured(share: float, value: int) -> None:
    assert bench.percentile(range(1, 101), share) == value


@pytest.mark.slow
def test_a_fresh_process_is_measured() -> None:
    found = bench.fresh("torchscript", 1)
    assert found["imports"][0] > found["build"][0] > 0
