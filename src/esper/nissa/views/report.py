"""One self-contained HTML file per run: numbers, pictures, and the why of each decision."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import NotRequired, TypedDict

from esper.errors import MissingExtraError, RunError
from esper.files import read_regular
from esper.nissa.run.damage import fitting
from esper.nissa.run.history import RunHistory, fold
from esper.nissa.run.journal import EVENTS_FILE, read_events
from esper.nissa.run.survival import notes, of_checkpoints, reopened
from esper.nissa.views import charts
from esper.nissa.views.map import model_map
from esper.nissa.views.why import headline, why
from esper.nissa.wording import count, duration, short
from esper.printable import counted, quoted, shortened

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup
except ImportError:
    raise MissingExtraError("jinja2", "report", "writing a report") from None

COMPARISON_FILE = "comparison.json"
MOST_COMPARISON = 1 << 20  # bytes
COMPARED = ("name", "accuracy", "parameters", "flops", "seconds")  # what each of its rows must hold


class Row(TypedDict):
    """A net that is compared; None is "not measured"."""

    name: str
    accuracy: float | None
    parameters: float | None
    flops: float | None
    seconds: float | None
    run: NotRequired[str | None]  # a folder below the run's


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run.

    Args:
        run_dir: Path of a run folder. Where it holds ``comparison.json``, a list of rows ``{name, accuracy,
            parameters, flops, seconds}``, the report compares; a row's ``run``, a folder below this one, adds
            its curves to the pictures.
        out: Path of the file to write; ``report.html`` in the run folder by default.

    Returns:
        The file written.

    Raises:
        RunError: The run folder is missing or damaged, or the report cannot be written.
    """
    folder = Path(run_dir)
    target = Path(out) if out is not None else folder / "report.html"
    with fitting(folder):
        history = fold(read_events(folder))
        if not history.started:
            raise RunError(
                f"the run in {folder} holds no run_started event; it ended before it began: train again"
            )
        rows = read_comparison(folder)
        others = {row["name"]: fold(read_events(folder / row["run"])) for row in rows if row.get("run")}
        page = render(history, rows, others)
    if os.path.exists(target) and not os.path.isfile(target):
        raise RunError(f"cannot write the report {target}: it is no regular file; choose another place")
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"cannot write the report {target}: {error.strerror}; choose another place with --out"
        ) from None
    return target


def read_comparison(folder: Path) -> list[Row]:
    """Read the rows this run is compared with; none where there is no comparison.

    Raises:
        RunError: The file is damaged, or a row lacks a column or names a run that is not there.
    """
    path = folder / COMPARISON_FILE
    if not os.path.lexists(path):
        return []
    content = read_regular(path, limit=MOST_COMPARISON, what="the comparison", error=RunError, follow=False)
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        said = shortened(str(error), 200)
        raise RunError(f"{path} is not JSON: {said}; write it again or remove it") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RunError(f"{path} must hold a list of rows with {', '.join(COMPARED)}")
    for row in rows:
        _check_row(path, row)
    return rows


def _check_row(path: Path, row: Mapping[str, object]) -> None:
    if lacking := [column for column in COMPARED if column not in row]:
        raise RunError(f"{path}: a row lacks {', '.join(lacking)}; every row has {', '.join(COMPARED)}")
    if not isinstance(row["name"], str):
        raise RunError(f"{path}: a row's name is {quoted(row['name'])}; give text")
    for column in COMPARED[1:]:
        if row[column] is not None and (isinstance(row[column], bool) or not isinstance(row[column], Real)):
            raise RunError(
                f"{path}: row {quoted(row['name'])} has the {column} {quoted(row[column])}, no number"
            )
    if (run := row.get("run")) is not None:
        _check_run(path, row["name"], run)


def _check_run(path: Path, name: str, run: object) -> None:
    """Refuse a run that is not below this one: a report shows nothing from elsewhere."""
    place = Path(run) if isinstance(run, str) and run and "\0" not in run else None
    folder = path.parent.resolve()
    if place is None or place.is_absolute() or not (folder / place).resolve().is_relative_to(folder):
        raise RunError(
            f"{path}: row {quoted(name)} names the run {quoted(run)}; give a folder below {folder}"
        )
    if not os.path.exists(folder / place / EVENTS_FILE):
        raise RunError(
            f"{path}: row {quoted(name)} names the run {quoted(run)}, which is not in {path.parent}"
        )


def render(history: RunHistory, rows: list[Row], others: dict[str, RunHistory]) -> str:
    """Fill the page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=short, count=count, duration=duration, reopened=reopened)
    pictures = {
        "learning": charts.learning(history, others),
        "parameters": charts.parameters(history, others),
        "lives": charts.lives(history) if history.seeds else None,
        "map": model_map(history),
    }
    decisions = history.decisions.values()
    return environment.get_template("report.html").render(
        counted=counted,
        history=history,
        totals=history.totals,
        metric=charts.metric_name(history),
        pictures={name: Markup(svg) if svg else None for name, svg in pictures.items()},  # our own SVG
        stories=[
            (story, headline(decision)) for story, decision in zip(why(history), decisions, strict=True)
        ],
        raced=any(seed.alpha.steps for seed in history.seeds.values()),
        rows=rows,
        troubles=[*history.faults, *history.fallbacks, *history.warnings],
        survived=notes(history),
        checkpoints=of_checkpoints(history),
    )
