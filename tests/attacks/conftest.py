"""Counts attacks by family, a file each, and prints the table at the end of a run."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent.name


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how many were tried and how many held; a test that tries many says how many itself."""
    tries, held = Counter[str](), Counter[str]()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            path = Path(report.location[0])
            if report.when == "call" and path.parent.name == HERE:
                told = dict(report.user_properties)
                family = path.stem.removeprefix("test_").replace("_", " ")
                tries[family] += told.get("tries", 1)
                held[family] += told.get("held", int(outcome == "passed"))
    if tries:
        terminalreporter.section("attacks")
        for family in sorted(tries):
            terminalreporter.line(f"{family:<28}{tries[family]:>7} tried{held[family]:>7} held")
        terminalreporter.line(f"{'all':<28}{tries.total():>7} tried{held.total():>7} held")


@pytest.fixture
def count(record_property: Any) -> Any:
    """Let a test say how many attacks it tried, and how many held."""

    def counted(tries: int, broken: int = 0) -> None:
        record_property("tries", tries)
        record_property("held", tries - broken)

    return counted
