"""``esper train``: train and grow what a YAML file describes."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

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
    place = Path(os.path.abspath(folder))  # what the config calls may go elsewhere
    aside = claim(folder, resume=resume is not None, fresh=fresh) if first else None
    if aside is not None:
        print(f"the earlier run is in {aside} now", file=sys.stderr)

    from esper.cli.run.course import end, run  # torch takes seconds: a mistake is told before
    from esper.cli.run.session import open_session
    from esper.nissa.run.journal import known_events
    from esper.nissa.views.live import LiveView

    past = known_events(place) if resume and first else []
    with LiveView(plain=plain or None, past=past) if first else nullcontext() as view:
        kept = resume is not None or recipe.checkpoints is not None
        trainer = open_session(Path(os.path.abspath(config)), place, keep=kept, on_event=view or ignore)
        ended_by = run(trainer, resume=resume is not None, override=override)
    folder = folder if Path(os.path.abspath(folder)) == place else place
    end(trainer, folder, view, ended_by, json=json)
