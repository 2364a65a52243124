"""The fragmentation bench sees a leak, and runs in its smoke form."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.fragmentation import UNITS, Cycles, leaked, main


def test_cycles_leave_nothing_and_what_is_kept_alive_is_counted() -> None:
    bench = Cycles("cpu", 16)
    before = leaked(bench.read("before"))
    bench.repeat(bench.cycle, 2)
    assert leaked(bench.read("after")) == before
    held = bench.growth.run.morphable.places[bench.site].kernel(2)
    assert leaked(bench.read("one kernel held")) == before + 1
    del held


def test_a_widening_adds_what_it_says() -> None:
    bench = Cycles("cpu", 16)
    bench.train()
    before, width = bench.held(), bench.growth.run.morphable.places[bench.site].site.width
    bench.widen()
    assert bench.growth.run.morphable.places[bench.site].site.width == width + UNITS
    bench.train()
    assert bench.held() > before


def test_a_quick_run_writes_and_judges_nothing(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "fragmentation.json").read_text())
    assert record["readings"][0]["after"] == "start"
    assert len(record["readings"]) == 4
