"""The suite's tables and promises, from whatever parts there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from benchmarks.compare import titled
from benchmarks.intervals import mean_of
from benchmarks.promises import Promise
from benchmarks.suite_runs.files import Record
from benchmarks.suite_runs.training import Run
from benchmarks.suite_runs.verdicts import (
    Verdict,
    best_of_ladder,
    geometric_mean,
    ladder_ratio,
    losses,
    quality,
    ratio,
)

ARMS = ("small", "grown", "same", "equal", "gromo", "full")
HELD_OUT_SHARE = 0.8  # of the held-out parts: 8 of 10


def part_table(record: Record) -> Table:
    """Show every arm of one part: its rate, size, figures and costs."""
    kind = "selection" if record.task.selection else "held out"
    title = f"{record.task.name} ({kind}), {record.schedule} rate, {len(record.seeds)} seeds"
    columns = (
        "arm",
        "rate",
        "steps",
        "params",
        "growths",
        record.task.metric,
        "test loss",
        "GFLOP",
        "growth",
        "s",
        "CPU-s",
    )
    table = titled(title, columns)
    order = [*ARMS[:-1], *(arm for arm in record.runs if arm.startswith("ladder")), "full"]
    for arm in (arm for arm in order if arm in record.runs):
        runs = record.runs[arm]
        table.add_row(
            arm,
            f"{runs[0].rate:g}",
            f"{runs[0].steps}",
            f"{mean(runs, 'parameters'):.0f}",
            f"{mean(runs, 'growths'):.1f}",
            mean_of([run.test for run in runs]).show(),
            mean_of([run.test_loss for run in runs]).show(),
            f"{mean(runs, 'flops') / 1e9:.3f}",
            f"{mean(runs, 'growth_flops') / 1e9:.3f}",
            f"{mean(runs, 'seconds'):.2f}",
            f"{mean(runs, 'cpu_seconds'):.2f}",
        )
    return table


def summary_table(records: Sequence[Record]) -> Table:
    """Show one row per part: grown against each of the others, gains positive, and its costs over full's."""
    heads = (
        "task",
        "rates",
        "seeds",
        "metric",
        "− full",
        "− same size",
        "− equal: metric",
        "loss",
        "− best of ladder",
    )
    costs = ("FLOPs/full", "s/full", "CPU-s/full", "FLOPs/ladder")
    table = titled(
        "grown against (gain [95 %]: points of accuracy / 100, or share of the loss)", (*heads, *costs)
    )
    for record in records:
        row = facts(record)
        table.add_row(
            record.task.name + ("" if record.task.selection else " *"),
            record.schedule,
            str(len(record.seeds)),
            record.task.metric,
            *(shown(row[name]) for name in ("full", "same", "equal", "equal_loss", "ladder")),
            *(figure(row[name]) for name in ("flops", "seconds", "cpu_seconds", "ladder_flops")),
        )
    table.caption = "* held out: no default was chosen on it"
    return table


def facts(record: Record) -> dict[str, Any]:
    """Say what ``summary_table`` shows of one part: verdicts and ratios, None where not measured."""
    best = best_of_ladder(record)
    return {
        "full": quality(record, "grown", "full"),
        "same": quality(record, "grown", "same"),
        "equal": quality(record, "grown", "equal"),
        "equal_loss": losses(record, "grown", "equal"),
        "ladder": None if best is None else quality(record, "grown", best),
        "flops": ratio(record, "flops"),
        "seconds": ratio(record, "seconds"),
        "cpu_seconds": ratio(record, "cpu_seconds"),
        "ladder_flops": ladder_ratio(record),
    }


def figures(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Say the same for a program."""
    rows = []
    for record in records:
        row = {"task": record.task.name, "schedule": record.schedule, "selection": record.task.selection}
        for name, value in facts(record).items():
            row[name] = {"call": value.call, **vars(value.gain)} if isinstance(value, Verdict) else value
        rows.append(row)
    return rows


def promises(records: Sequence[Record], whole: bool = True) -> list[Promise]:
    """Judge the held-out parts together, every part against its own size, and the three named tasks.

    Args:
        records: The parts there are.
        whole: Promises on what was not measured are missed; else they are left out.
    """
    judged = [*together(records), *named(records)]
    return judged if whole else [promise for promise in judged if promise.measured is not None]


def together(records: Sequence[Record]) -> list[Promise]:
    """Judge the held-out parts as one, and every part against its own size."""
    held_out = [facts(record) for record in records if not record.task.selection]
    every = [facts(record) for record in records]

    def share(name: str) -> float | None:
        judged = [row[name] for row in held_out if row[name] is not None]
        return sum(verdict.not_worse for verdict in judged) / len(held_out) if judged else None

    def average(name: str) -> float | None:
        return geometric_mean([row[name] for row in held_out])

    own = [row["same"] for row in every if row["same"] is not None]
    return [
        Promise(
            "held out: share not worse than full size, full length", share("full"), ">=", HELD_OUT_SHARE, 2
        ),
        Promise("held out: FLOPs, grown / full, geometric mean", average("flops"), "<=", 0.7, 2),
        Promise("held out: wall time, grown / full, geometric mean", average("seconds"), "<=", 1.0, 2),
        Promise(
            "all: parts worse than fixed at their own size",
            sum(v.worse for v in own) if own else None,
            "<=",
            0,
            0,
        ),
        Promise(
            "held out: share not worse than the ladder's best size", share("ladder"), ">=", HELD_OUT_SHARE, 2
        ),
        Promise(
            "held out: FLOPs, grown / whole ladder, geometric mean", average("ladder_flops"), "<=", 0.5, 2
        ),
    ]


def named(records: Sequence[Record]) -> list[Promise]:
    """Judge the tasks for which a figure was said; under the first schedule that was run of each."""
    first = {record.task.name: record for record in reversed(records)}
    for record in records:
        if record.schedule == record.task.schedules[0]:
            first[record.task.name] = record

    def of(task: str, value: Callable[[Record], float | None]) -> float | None:
        return value(first[task]) if task in first and "grown" in first[task].runs else None

    def ahead(record: Record) -> float | None:
        verdict = losses(record, "grown", "equal")
        return None if verdict is None else verdict.gain.mean

    return [
        Promise(
            "digits CNN: accuracy", of("digits-cnn", lambda r: mean(r.runs["grown"], "test")), ">=", 0.980
        ),
        Promise(
            "digits CNN: FLOPs, grown / full", of("digits-cnn", lambda r: ratio(r, "flops")), "<=", 0.5, 2
        ),
        Promise(
            "digits CNN: wall time, grown / full",
            of("digits-cnn", lambda r: ratio(r, "seconds")),
            "<=",
            1.0,
            2,
        ),
        Promise("GPT: share of the loss below four layers at equal compute", of("gpt", ahead), ">", 0.0),
        Promise(
            "student-teacher: MSE",
            of("teacher-uniform", lambda r: mean(r.runs["grown"], "test")),
            "<=",
            0.006,
        ),
        Promise(
            "student-teacher: GFLOP in all",
            of("teacher-uniform", lambda r: mean(r.runs["grown"], "flops") / 1e9),
            "<=",
            1.80,
        ),
    ]


def mean(runs: Sequence[Run], name: str) -> float:
    return mean_of([getattr(run, name) for run in runs]).mean


def shown(verdict: Verdict | None) -> str:
    return "–" if verdict is None else verdict.show()


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
