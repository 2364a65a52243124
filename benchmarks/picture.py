"""Two panels per network: what accuracy a size buys, and what accuracy the work spent so far has bought."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.compare import Arms, average
from benchmarks.intervals import mean_of
from benchmarks.runs import Result
from benchmarks.tasks import Task, Widths

matplotlib.use("Agg")
COLOURS = {"fixed": "#7a7a7a", "fixed:small": "#c49a3a", "grown": "#1f77b4", "gromo": "#2a9d6f"}


def draw(path: Path, task: Task, arms: Arms, frontier: Mapping[Widths, Sequence[Result]]) -> None:
    """Write ``path`` as .png and .svg."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_parameters(left, arms, frontier)
    by_flops(right, arms)
    middle = [average(results, "test") for results in frontier.values()] or [0.9]
    left.set_ylim(statistics.median(middle) - 0.1, 1.0)  # the smallest networks would hide the rest
    left.set_ylabel("test accuracy, mean over seeds")
    figure.suptitle(f"{task.name}: grown against fixed, each at its best rate")
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)


def by_parameters(axes: Axes, arms: Arms, frontier: Mapping[Widths, Sequence[Result]]) -> None:
    """Draw the fixed networks' frontier and where growing starts, passes and ends."""
    points = sorted((average(results, "parameters"), mean_sem(results)) for results in frontier.values())
    if points:
        heights, errors = zip(*(point for _, point in points), strict=True)
        sizes = [size for size, _ in points]
        axes.errorbar(sizes, heights, errors, marker="o", color=COLOURS["fixed"], label="fixed, by width")
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
        axes.minorticks_off()
    for arm in ("grown", "gromo"):
        if arm in arms:
            curve = trajectory(arms[arm])
            sizes, heights = curve["parameters"], curve["test"]
            axes.plot(sizes, heights, color=COLOURS[arm], label=f"{arm}, while training", lw=1)
            axes.plot(sizes[-1], heights[-1], "*", color=COLOURS[arm], ms=13, label=f"{arm}, at the end")
    axes.set_xlabel("parameters")
    axes.legend(loc="lower right", fontsize=8)


def by_flops(axes: Axes, arms: Arms) -> None:
    """Draw accuracy over all that was spent, growth included."""
    for arm, colour in COLOURS.items():
        if arm in arms:
            curve = trajectory(arms[arm])
            axes.plot(curve["gflop"], curve["test"], color=colour, label=arm, lw=1.4)
    axes.set_xlabel("GFLOP spent, growth included")
    axes.legend(loc="lower right", fontsize=8)


def trajectory(results: Sequence[Result]) -> dict[str, list[float]]:
    """Average the seeds' curves point by point."""
    moments = list(zip(*(result.curve for result in results), strict=True))
    return {
        "parameters": [mean_of([point.parameters for point in moment]).mean for moment in moments],
        "gflop": [mean_of([point.flops for point in moment]).mean / 1e9 for moment in moments],
        "test": [mean_of([point.test for point in moment]).mean for moment in moments],
    }


def mean_sem(results: Sequence[Result]) -> tuple[float, float]:
    mean = mean_of([result.test for result in results])
    return mean.mean, mean.sem or 0.0
