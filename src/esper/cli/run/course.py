"""The course of ``esper train`` once its trainer is made: to its end, or to the signal that stops it."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from esper.cli.application import FAILED
from esper.cli.output import growth_lines, print_json, say
from esper.cli.run.going_on import go_on
from esper.cli.run.last_save import save_model
from esper.cli.run.stopping import end_as, stopped_by_signals
from esper.distributed.launch import launched, leave
from esper.nissa.views.live import LiveView
from esper.tolaria.trainer import Trainer


def run(trainer: Trainer, *, resume: bool, override: bool) -> int | None:
    """Train; return the signal that ended it, None at its end."""
    if resume:
        go_on(trainer, override=override)
    if trainer.manager is None or launched():  # torchrun ends those that wait for a lost one by SIGTERM
        trainer.fit()
        return None
    with stopped_by_signals(trainer) as asked:
        trainer.fit()
    return asked.signum if trainer.stopped else None


def end(trainer: Trainer, folder: Path, view: LiveView | None, ended_by: int | None, *, json: bool) -> None:
    """Save the model, and say what became of the run; or end as a signal does.

    Args:
        trainer: Trainer whose ``fit`` has come back.
        folder: Path of the run's folder.
        view: View of the first process; None in the others.
        ended_by: Number of the signal that stopped it; None: none did.
        json: True to print the totals as JSON.
    """
    if ended_by is not None:
        if view is not None:
            print(stopped_line(trainer), file=sys.stderr, flush=True)
        end_as(ended_by)
    elif view is not None:
        model = save_model(trainer, folder)
        if json:
            print_json(
                {**view.history.totals, "run": str(folder), "model": None if model is None else str(model)}
            )
        else:
            say("\n".join(growth_lines(view.history)))
            say(f"run folder: {folder} (esper report {folder} draws it, esper why {folder} explains it)")
        if model != folder / "model":
            raise typer.Exit(FAILED)
    if launched():
        leave()


def stopped_line(trainer: Trainer) -> str:
    """Say where a run was stopped, and how it goes on."""
    if trainer.manager is None or trainer.manager.last is None:
        return "esper: stopped by a signal; no checkpoint could be written"
    return (
        f"esper: stopped by a signal; the same command with --resume auto goes on from {trainer.manager.last}"
    )
