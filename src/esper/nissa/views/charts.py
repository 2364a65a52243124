"""Pictures of a run as SVG strings; the one file that imports matplotlib.

Text takes the colour of the page (``currentColor``), so the same picture reads on light and dark;
lines differ in colour and dash.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import TypeAlias

from esper.errors import MissingExtraError
from esper.nissa.run.history import RunHistory
from esper.nissa.run.records import DecisionHistory, SeedHistory, Series, Span
from esper.nissa.run.survival import notes
from esper.nissa.views.palette import BLUE, GREEN, GREY, ORANGE, PURPLE, STAGE_COLOURS, VERMILION
from esper.printable import printable

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter
except ImportError:
    raise MissingExtraError("matplotlib", "report", "drawing a run's pictures") from None

INK = "#010203"  # stands for the page's own text colour until the SVG is written
Dash: TypeAlias = "str | tuple[int, tuple[float, ...]]"  # as matplotlib takes it
LINES: list[tuple[str, Dash]] = [
    (BLUE, "-"),
    (VERMILION, "--"),
    (GREY, (0, (4, 1.5, 1, 1.5))),
    (GREEN, ":"),
    (PURPLE, "-."),
    (ORANGE, "-"),
]
BEFELL = {
    "resumed": (">", BLUE),
    "alarm": ("v", VERMILION),
    "rolled back": ("<", PURPLE),
    "taken back": ("<", ORANGE),
    "re-opened": ("o", GREEN),
}  # above a picture
ENDINGS = {"FOSSILISED": "D", "CULLED": "X"}  # how a life ends, as marks; every other stage is a band
NAMED = 2  # places that grow at one step and have room in a picture
UPRIGHT = 26  # characters of what grew that have room along a picture's height
BANDS = {stage: colour for stage, colour in STAGE_COLOURS.items() if stage not in ENDINGS}
STYLE: dict[str, str | float | bool] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "esper",
    "text.parse_math": False,  # a name may hold a dollar sign
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def learning(history: RunHistory, others: Mapping[str, RunHistory] | None = None, name: str = "grown") -> str:
    """Draw the training loss and the first held-out metric over steps, growth events marked.

    Args:
        history: History of the run drawn.
        others: Histories to compare with (the no-growth twin, the fixed net), by name.
        name: The run's own name in the legend.
    """
    runs = {name: history, **(others or {})}
    metric = metric_name(history)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 5.2 if metric else 3.0), layout="constrained")
        axes = figure.subplots(2 if metric else 1, 1, sharex=True, squeeze=False)[:, 0]
        for (label, run), (colour, dash) in zip(runs.items(), LINES * len(runs), strict=False):
            _line(axes[0], run.loss, _label(label), colour, dash)
            if metric:
                points = Series(
                    [epoch.step for epoch in run.epochs], [epoch.metrics.get(metric) for epoch in run.epochs]
                )
                _line(axes[1], points, _label(label), colour, dash)
        axes[0].set(title="Training loss", yscale="log" if _wants_log(runs.values()) else "linear")
        axes[0].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes[0].yaxis.set_minor_formatter(_two_or_five)
        if metric:
            axes[1].set(title=_label(f"Held-out {metric}"))
        _steps_below(axes[-1])
        for axis in axes:
            _mark_growth(axis, history, label=axis is axes[0])
            _mark_rollbacks(axis, history)
        if len(runs) > 1:
            axes[-1].legend(loc="best")
        if keys := _mark_survival(axes[0], history):
            axes[0].set_title(axes[0].get_title(loc="left"), pad=16)  # above the marks
            figure.legend(handles=keys, loc="outside upper right", ncols=len(keys), fontsize=9)
        return _svg(figure, "Training loss and held-out metric over steps, with growth events")


def parameters(
    history: RunHistory, others: Mapping[str, RunHistory] | None = None, name: str = "grown"
) -> str:
    """Draw the number of parameters over steps."""
    runs = {name: history, **(others or {})}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 2.6), layout="constrained")
        axis = figure.subplots()
        for (label, run), (colour, dash) in zip(runs.items(), LINES * len(runs), strict=False):
            _line(axis, run.parameters, _label(label), colour, dash, drawstyle="steps-post")
        axis.set(title="Parameters", ylim=(0, None))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        _steps_below(axis)
        if len(runs) > 1:
            axis.legend(loc="best")
        return _svg(figure, "Parameters over steps")


def lives(history: RunHistory) -> str:
    """Draw one row per seed's life: its stages as bands, its alpha as a line over them, its end as a mark."""
    rows = sorted(
        ((seed, life) for seed in history.seeds.values() for life in seed.lives),
        key=lambda row: row[1][0].start,
    )
    with mpl.rc_context({**STYLE, "axes.grid": False, "axes.spines.left": False}):
        figure = Figure(figsize=(8.6, 1.0 + 0.42 * max(len(rows), 1)), layout="constrained")
        axis = figure.subplots()
        for row, (seed, life) in enumerate(rows):
            _life(axis, seed, life, row, history.step)
        axis.set_yticks(
            range(len(rows)), [_label(f"{seed.site} at {life[0].start:,}") for seed, life in rows]
        )
        axis.tick_params(axis="y", length=0)
        axis.set(xlim=(0, None), ylim=(max(len(rows), 1) - 0.4, -0.6))
        _steps_below(axis, "steps since germination")
        seen = {
            span.stage for _, life in rows for span in life if span.stage in ENDINGS or span.end != span.start
        }
        keys = [Patch(color=colour, label=_words(stage)) for stage, colour in BANDS.items() if stage in seen]
        keys += [
            Line2D([], [], marker=marker, color=STAGE_COLOURS[stage], linestyle="", label=_words(stage))
            for stage, marker in ENDINGS.items()
            if stage in seen
        ]
        if keys:
            figure.legend(
                handles=keys, loc="outside upper left", ncols=len(keys), fontsize=9, handlelength=1.2
            )
        return _svg(figure, "Stages and alpha of every seed, from its germination to its end")


def metric_name(history: RunHistory) -> str | None:
    """Pick the metric a picture shows: accuracy, else the first that is not a loss, else a loss."""
    names = dict.fromkeys(name for epoch in history.epochs for name in epoch.metrics)
    ordered = sorted(names, key=lambda name: (name != "accuracy", "loss" in name, name == "train_loss"))
    return ordered[0] if ordered else None


def _line(
    axis: Axes, series: Series, label: str, colour: str, dash: Dash, drawstyle: str = "default"
) -> None:
    values = [float("nan") if value is None else value for value in series.values]
    axis.plot(series.steps, values, label=label, color=colour, linestyle=dash, drawstyle=drawstyle)


def _two_or_five(value: float, _: int) -> str:
    """Label the 2 and the 5 of a decade: enough for a loss that stays within one, not too much for three."""
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""


def _steps_below(axis: Axes, label: str = "step") -> None:
    axis.set_xlabel(label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mark_growth(axis: Axes, history: RunHistory, *, label: bool) -> None:
    at: dict[int, list[DecisionHistory]] = {}
    for decision in history.decisions.values():
        if decision.widened_at is not None:
            at.setdefault(decision.widened_at, []).append(decision)
    for step, grown in at.items():
        lost = all(decision.kept is False for decision in grown)
        axis.axvline(step, color=GREY if lost else GREEN, linewidth=1.2, alpha=0.8, zorder=0)
        if label:
            axis.annotate(
                _label(_grown(grown)),
                (step, 0.0),
                (3, 4),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=90,
                va="bottom",
                ha="left",
                fontsize=8.5,
            )


def _grown(decisions: list[DecisionHistory]) -> str:
    """Say what grew at one step; where many places did, or their names are too long, how much in all."""
    named = ", ".join(f"+{decision.units} {decision.site}" for decision in decisions)
    if len(decisions) > 1 and (len(decisions) > NAMED or len(named) > UPRIGHT):
        return f"+{sum(decision.units for decision in decisions):,} at {len(decisions)} places"
    if len(named) > UPRIGHT:
        units, _, site = named.partition(" ")
        return f"{units} …{site[len(units) + 2 - UPRIGHT :]}"
    return named


def _mark_rollbacks(axis: Axes, history: RunHistory) -> None:
    """Shade the steps that were lost."""
    for events, colour in ((history.rollbacks, PURPLE), (history.taken_back, ORANGE)):
        for event in events:
            axis.axvspan(event.data["to"], event.step, color=colour, alpha=0.18, lw=0, zorder=0)


def _mark_survival(axis: Axes, history: RunHistory) -> list[Line2D]:
    """Mark above a picture what befell the run; returns the keys of the marks."""
    above = axis.get_xaxis_transform()  # x in steps, y as a share of the picture's height
    at: dict[str, list[int]] = {kind: [] for kind in BEFELL}
    for note in notes(history):  # a rollback where it led to, away from its alarm
        at.setdefault(note.kind, []).append(note.step if note.to is None else note.to)
    at["re-opened"] = [event.step for event in history.reopened]
    keys = []
    for kind, (marker, colour) in BEFELL.items():
        if at[kind]:  # a step once, however often
            marks = dict.fromkeys(at[kind], 1.03)
            axis.plot(
                list(marks),
                list(marks.values()),
                transform=above,
                clip_on=False,
                marker=marker,
                color=colour,
                linestyle="",
                markersize=6,
            )
            keys.append(Line2D([], [], label=kind, marker=marker, color=colour, linestyle="", markersize=6))
    return keys


def _life(axis: Axes, seed: SeedHistory, life: list[Span], row: int, last_step: int) -> None:
    begun = life[0].start
    until = life[-1].start if life[-1].stage in ENDINGS else last_step
    for span in life:
        if span.stage in ENDINGS:
            axis.plot(
                span.start - begun, row, ENDINGS[span.stage], color=STAGE_COLOURS[span.stage], markersize=9
            )
        else:
            width = (until if span.end is None else span.end) - span.start
            colour = STAGE_COLOURS[span.stage]
            axis.broken_barh(
                [(span.start - begun, width)], (row - 0.38, 0.76), color=colour, alpha=0.75, lw=0
            )
    alpha = [
        point for point in zip(seed.alpha.steps, seed.alpha.values, strict=True) if begun <= point[0] <= until
    ]
    if alpha:
        steps = [step - begun for step, _ in alpha]
        heights = [row + 0.36 - 0.72 * (math.nan if value is None else value) for _, value in alpha]
        axis.plot([*steps, until - begun], [*heights, heights[-1]], color=INK, linewidth=1.4)


def _words(stage: str) -> str:
    return _label(stage.lower().replace("_", " "))


def _label(text: str) -> str:
    """Write a name without what no font has, for good reason."""
    return printable(text, keep="")


def _wants_log(runs: Iterable[RunHistory]) -> bool:
    """Tell whether the losses span enough for a log axis, and it can show every one."""
    values = [
        value for run in runs for value in run.loss.values if value is not None and math.isfinite(value)
    ]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 3


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r'<g id="[^"]*">', "<g>", svg
    )  # several pictures share one page, and ids must be unique there
    head, body = svg.split(">", 1)
    alone = "<style>svg:root{color:#1f2328}@media(prefers-color-scheme:dark){svg:root{color:#e6e6e6}}</style>"
    return f'{head} role="img"><title>{escape(title)}</title>{alone}{body}'
