"""README's table from the parts: the wins, the ties and the losses, one row per held-out part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from benchmarks.intervals import paired_difference
from benchmarks.suite_runs.files import Record
from benchmarks.suite_runs.joining import mean
from benchmarks.suite_runs.verdicts import quality, ratio

HEADS = (
    "held-out task, rate (seeds)",
    "grown",
    "full size, full length",
    "difference [95 %]",
    "FLOPs",
    "wall",
    "own size",
    "equal compute",
)
SMALL = 1e-3  # a loss below it takes an exponent
WORDS = {"win": "won", "loss": "lost", "tie": "level", "unclear": "unclear"}


def table(records: Sequence[Record]) -> str:
    """Draw the held-out parts."""
    rows = [row(record) for record in records if not record.task.selection]
    rule = ["---"] * len(HEADS)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in chain((HEADS, rule), rows))


def row(record: Record) -> list[str]:
    """Describe a part; the difference is grown's metric minus the full net's, and a word says who won."""
    verdict = quality(record, "grown", "full")
    assert verdict is not None
    pairs = [[run.test for run in record.runs[arm]] for arm in ("grown", "full")]
    found = paired_difference(*pairs)
    others = (mean(record.runs[arm], "test") if arm in record.runs else None for arm in ("same", "equal"))
    return [
        f"{record.task.name}, {record.schedule}, {record.task.metric} ({len(record.seeds)})",
        figure(mean(record.runs["grown"], "test")),
        figure(mean(record.runs["full"], "test")),
        f"{WORDS[verdict.call]}: {found.show()}",
        *(f"{ratio(record, name):.2f}" for name in ("flops", "seconds")),
        *("–" if other is None else figure(other) for other in others),
    ]


def figure(value: float) -> str:
    """Show a metric in four places, and one that would vanish there with its exponent."""
    return f"{value:.4f}" if value >= SMALL else f"{value:.1e}"
