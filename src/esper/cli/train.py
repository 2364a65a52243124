"""``esper train``: train and grow what a YAML file describes."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from esper.cli.application import FAILED
from esper.cli.output import growth_lines, print_json, say
from esper.contracts import ignore


def train(
    config: Annotated[Path, typer.Argument(help="A YAML file; examples/ has some.")],
    run_dir: Annotated[
        Path | None, typer.Option(help="Where to write; the config's run_dir by default.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="auto: keep checkpoints in the run folder, and go on from the newest sound one."),
    ] = None,
    override: Annotated[
        bool,
        typer.Option("--override", help="With --resume: go on by the config as it is now, where it differs."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; an earlier run in the folder is moved aside.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the run's totals as JSON.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Progress as lines, always.")] = False,
) -> None:
    """Train and grow the model a config describes; write a run folder with its events and the grown model.

    A config is code: it imports and calls what it names. Train none that you would not run.

    Where checkpoints are kept, SIGTERM, SIGINT and SIGHUP end training after its step, with a checkpoint;
    under torchrun they end it at once.

    Several processes train together under torchrun: torchrun --nproc-per-node 2 -m esper train CONFIG
    """
    from esper.cli.run import resolve
    from esper.cli.run.recipe import growth_settings, read_recipe
    from esper.cli.run.run_folder import claim

    if resume not in (None, "auto"):
        raise typer.BadParameter(f"--resume {resume!r}: auto is all there is")
    if override and resume is None:
        raise typer.BadParameter("--override says how to go on with a run; give --resume auto too")
    recipe = read_recipe(config)
    growth_settings(config, recipe)
    resolve.see_folder(config, recipe)
    folder = run_dir or Path(recipe.run_dir or Path("runs") / config.stem)
    first = os.environ.get("RANK", "0") == "0"
    aside = claim(folder, resume=resume is not None, fresh=fresh) if first else None
    if aside is not None:
        print(f"the earlier run is in {aside} now", file=sys.stderr)

    from esper.cli.run.session import open_session  # torch takes seconds: a mistake is told before
    from esper.nissa.run.journal import known_events
    from esper.nissa.views.live import LiveView

    past = known_events(folder) if resume and first else []
    with LiveView(plain=plain or None, past=past) if first else nullcontext() as view:
        kept = resume is not None or recipe.checkpoints is not None
        trainer = open_session(config, folder, keep=kept, on_event=view or ignore)
        ended_by = run(trainer, resume=resume is not None, override=override)
    end(trainer, folder, view, ended_by, json=json)


def run(trainer: Any, *, resume: bool, override: bool) -> int | None:
    """Train; return the signal that ended it, None at its end."""
    from esper.cli.run.going_on import go_on
    from esper.cli.run.stopping import stopped_by_signals
    from esper.distributed.launch import launched

    if resume:
        go_on(trainer, override=override)
    if trainer.manager is None or launched():  # torchrun ends those that wait for a lost one by SIGTERM
        trainer.fit()
        return None
    with stopped_by_signals(trainer) as asked:
        trainer.fit()
    return asked.signum if trainer.stopped else None


def end(trainer: Any, folder: Path, view: Any, ended_by: int | None, *, json: bool) -> None:
    """Save the model, and say what became of the run; or end as a signal does."""
    from esper.cli.run.last_save import save_model
    from esper.cli.run.stopping import end_as
    from esper.distributed.launch import launched, leave

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


def stopped_line(trainer: Any) -> str:
    """Say where a run was stopped, and how it goes on."""
    if trainer.manager.last is None:
        return "esper: stopped by a signal; no checkpoint could be written"
    return (
        f"esper: stopped by a signal; the same command with --resume auto goes on from {trainer.manager.last}"
    )
