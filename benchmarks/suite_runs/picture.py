"""A panel per task: what quality the work spent so far has bought, growth included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.suite_runs.files import Record
from benchmarks.suite_runs.joining import mean

matplotlib.use("Agg")
COLUMNS = 4
DECADES = 1e-4  # of a loss: what is below is zero for every purpose
LINES = {"full": "#7a7a7a", "small": "#c49a3a", "grown": "#1f77b4"}
LABELS = {"full": "fixed, full size", "small": "fixed, small", "grown": "grown"}
LADDER, EQUAL, SAME, GROMO = "#b0b0b0", "#2a9d6f", "#d1495b", "#8e5ea2"


def draw(path: Path, records: Sequence[Record]) -> list[Path]:
    """Write ``path`` as .png and .svg, one panel per task: of its schedules, the first that was run."""
    chosen = first_schedules(records)
    rows = -(-len(chosen) // COLUMNS)
    figure = Figure(figsize=(3.4 * COLUMNS, 2.9 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, record in zip(panels, chosen, strict=False):
        panel(axes, record)
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    handles = {
        label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in written:
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
    return written


def first_schedules(records: Sequence[Record]) -> list[Record]:
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task.name, []).append(record)
    return [min(found, key=lambda r: rank(r)) for found in by_task.values()]


def rank(record: Record) -> int:
    known = record.task.schedules
    return known.index(record.schedule) if record.schedule in known else len(known)


def panel(axes: Axes, record: Record) -> None:
    """Draw the arms' curves, the ladder's ends and the two fixed networks that knew what growth found."""
    task = record.task
    ladder = [(mean(runs, "flops") / 1e9, mean(runs, "test")) for runs in record.ladder.values()]
    axes.plot(
        *zip(*ladder, strict=True), "o--", color=LADDER, ms=4, lw=1, label="fixed, every size of the ladder"
    )
    for arm, colour in LINES.items():
        if arm in record.curves:
            curve = record.curves[arm]
            spent = [flops / 1e9 for flops in curve["flops"]]
            axes.plot(
                spent, curve["test"], color=colour, lw=1.8 if arm == "grown" else 1.2, label=LABELS[arm]
            )
    for arm, colour, marker, label in (
        ("equal", EQUAL, "D", "fixed, full size, equal compute"),
        ("same", SAME, "s", "fixed, grown's size"),
        ("gromo", GROMO, "^", "gromo"),
        ("grown", LINES["grown"], "*", "grown, at the end"),
    ):
        if arm in record.runs:
            runs = record.runs[arm]
            size = 13 if arm == "grown" else 5
            end = mean(runs, "flops") / 1e9, mean(runs, "test")
            axes.plot(*end, marker, color=colour, ms=size, label=label, zorder=4)
    axes.set_xscale("log")
    ends = [arm for arm in record.runs if arm != "small"]  # the small network may be nowhere near
    heights = [mean(record.runs[arm], "test") for arm in ends]
    limits(axes, heights, task.higher_is_better)
    axes.set_title(f"{task.name}, {record.schedule}" + ("" if task.selection else " (held out)"), fontsize=10)
    axes.set_ylabel(f"test {task.metric}", fontsize=9)
    axes.set_xlabel("GFLOP spent", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def limits(axes: Axes, ends: Sequence[float], higher_is_better: bool) -> None:
    """Show where runs end; their beginnings would squeeze it, and a loss near zero needs a log scale."""
    finite = [end for end in ends if math.isfinite(end)]  # an arm that diverged has no place
    if not finite:
        return
    low, high = min(finite), max(finite)
    if higher_is_better:
        margin = max(0.3 * (high - low), 0.01)
        axes.set_ylim(low - margin, min(1.0, high + 0.5 * margin) + 0.002)
    elif low > 0 and high / low > 3:
        axes.set_yscale("log")
        axes.set_ylim(max(low, high * DECADES) / 1.5, high * 2)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        margin = max(0.3 * (high - low), 0.02 * high)
        axes.set_ylim(low - margin, high + margin)
