"""``esper train``: train and grow what a YAML file describes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

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
    json: Annotated[bool, typer.Option("--json", help="Print the run's totals as JSON.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Progress as lines, always.")] = False,
) -> None:
    """Train and grow the model a config describes; write a run folder with its events and the grown model.

    A config is code: it imports and calls what it names. Train none that you would not run.

    Several processes train together under torchrun: torchrun --nproc-per-node 2 -m esper train CONFIG
    """
    from esper.cli import resolve
    from esper.cli.recipe import growth_settings, read_recipe

    if resume not in (None, "auto"):
        raise typer.BadParameter(f"--resume {resume!r}: auto is all there is")
    recipe = read_recipe(config)
    growth_settings(config, recipe)
    resolve.see_folder(config, recipe)

    from esper.cli.session import open_session  # torch takes seconds: a mistake is told before
    from esper.nissa.journal import known_events
    from esper.nissa.live import LiveView
    from esper.tolaria.distributed.launch import launched, leave

    folder = run_dir or Path(recipe.run_dir or Path("runs") / config.stem)
    together, first = launched(), os.environ.get("RANK", "0") == "0"
    past = known_events(folder) if resume and first else []
    with LiveView(plain=plain or None, past=past) if first else nullcontext() as view:
        trainer = open_session(config, folder, keep=resume is not None, on_event=view or ignore)
        if resume is not None:
            trainer.resume()
        trainer.fit()
    if view is not None:
        trainer.growth.save(folder / "model")
        if json:
            print_json({**view.history.totals, "run": str(folder), "model": str(folder / "model")})
        else:
            say("\n".join(growth_lines(view.history)))
            say(f"run folder: {folder} (esper report {folder} draws it, esper why {folder} explains it)")
    if together:
        leave()
