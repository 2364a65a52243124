"""``esper report``: a run as one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.output import print_json, say
from esper.nissa.run.damage import fitting


def report(
    run: Annotated[Path, typer.Argument(help="The run's folder (it holds events.jsonl).")],
    out: Annotated[Path | None, typer.Option(help="The file to write; RUN/report.html by default.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the run's totals and the path as JSON.")
    ] = False,
) -> None:
    """Write a run's report: numbers, pictures, and the why of each decision, in one HTML file."""
    from esper.nissa.run.history import fold
    from esper.nissa.run.journal import read_events
    from esper.nissa.views.report import write_report

    path = write_report(run, out)
    if json:
        with fitting(run):
            print_json({**fold(read_events(run)).totals, "report": str(path)})
    else:
        say(str(path))
