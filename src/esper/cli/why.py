"""``esper why``: what a decision saw, weighed, chose, and what it was worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.output import print_json, say
from esper.nissa.run.damage import fitting
from esper.nissa.run.history import fold
from esper.nissa.run.journal import read_events
from esper.nissa.views.why import as_text
from esper.nissa.views.why import why as explained


def why(
    run: Annotated[Path, typer.Argument(help="The run's folder (it holds events.jsonl).")],
    decision: Annotated[
        int | None, typer.Argument(help="A decision's number; all of them by default.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a list with one entry per decision.")
    ] = False,
) -> None:
    """Explain a run's decisions: inputs, arms, propensity, race, gate, predicted against realised gain."""
    with fitting(run):
        history = fold(read_events(run))
        if json:
            print_json(explained(history, decision))
        else:
            say(as_text(history, decision) or "The run took no decision.")
