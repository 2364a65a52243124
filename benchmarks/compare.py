"""Best against best: each arm's learning rate from the same grid, then every arm's figures in one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.intervals import Mean, Paired, mean_of, paired_difference
from benchmarks.runs import Result
from benchmarks.tasks import Task

Arms = Mapping[str, Sequence[Result]]  # an arm's runs, in the order of the seeds
Grid = Mapping[tuple[str, float], Sequence[Result]]  # the same at every (arm, rate)
COSTS = ("parameters", "growths", "training_flops", "growth_flops", "seconds")


def by_arm_and_rate(results: Sequence[Result]) -> dict[tuple[str, float], list[Result]]:
    """Group runs into the cells of a grid."""
    grid: dict[tuple[str, float], list[Result]] = {}
    for result in results:
        grid.setdefault((result.arm, result.rate), []).append(result)
    return grid


def choose_rates(grid: Grid, task: Task) -> dict[str, float]:
    """Choose each arm's rate by its mean score on the probe; the reported figure has no say."""
    sign = 1 if task.higher_is_better else -1
    chosen: dict[str, tuple[float, float]] = {}
    for (arm, rate), results in grid.items():
        score = sign * average(results, "probe")
        score = -math.inf if math.isnan(score) else score  # a run that diverged is the worst there is
        if arm not in chosen or score > chosen[arm][0]:
            chosen[arm] = (score, rate)
    return {arm: rate for arm, (_, rate) in chosen.items()}


def rate_table(title: str, grid: Grid, chosen: Mapping[str, float], figure: str) -> Table:
    """Show ``figure`` of every arm at every fixed rate, the chosen one marked."""
    rates = sorted({rate for _, rate in grid})
    table = titled(title, ["arm", *(f"{rate:g}" for rate in rates)])
    for arm, best in chosen.items():
        cells = {rate: show(grid.get((arm, rate), ()), figure) for rate in rates}
        cells[best] = f"[bold]{cells[best]} *[/]"
        table.add_row(arm, *cells.values())
    return table


def arm_table(title: str, arms: Arms, figures: Sequence[str], against: str) -> Table:
    """Show each arm's scores, its paired difference in the first figure to ``against``, and what it cost."""
    difference = f"{figures[0]} − {against} [95 %]"
    costs = ("GFLOP", "of it growth", "s")
    table = titled(title, ["arm", "rate", "params", "growths", *figures, difference, *costs])
    for arm, results in arms.items():
        compared = arm != against and against in arms
        table.add_row(
            arm,
            f"{results[0].rate:g}",
            f"{average(results, 'parameters'):.0f}",
            f"{average(results, 'growths'):.1f}",
            *(show(results, figure) for figure in figures),
            paired(results, arms[against], figures[0]).show() if compared else "",
            f"{average(results, 'flops') / 1e9:.3f}",
            f"{average(results, 'growth_flops') / 1e9:.3f}",
            f"{average(results, 'seconds'):.2f}",
        )
    return table


def summary(arms: Arms, figures: Sequence[str], against: str) -> dict[str, Any]:
    """Say the same as ``arm_table`` for a program."""
    record: dict[str, Any] = {}
    for arm, results in arms.items():
        record[arm] = {"rate": results[0].rate}
        record[arm] |= {
            name: vars(mean_of([getattr(result, name) for result in results])) for name in figures
        }
        record[arm] |= {name: average(results, name) for name in COSTS}
        if arm != against and against in arms:
            record[arm][f"{figures[0]} minus {against}"] = vars(paired(results, arms[against], figures[0]))
    return record


def paired(a: Sequence[Result], b: Sequence[Result], figure: str) -> Paired:
    """Compare two arms seed by seed."""
    seeds = [[result.seed for result in side] for side in (a, b)]
    if seeds[0] != seeds[1]:
        raise ValueError(f"paired runs need the same seeds, got {seeds[0]} and {seeds[1]}")
    return paired_difference(*([getattr(result, figure) for result in side] for side in (a, b)))


def mean_over(results: Sequence[Result], figure: str) -> Mean:
    return mean_of([getattr(result, figure) for result in results])


def average(results: Sequence[Result], figure: str) -> float:
    return mean_over(results, figure).mean


def show(results: Sequence[Result], figure: str) -> str:
    return mean_over(results, figure).show() if results else "–"


def titled(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index == 0)
    return table
