"""``esper train``: train and grow what a YAML file describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.output import growth_lines, print_json


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
    """Train and grow the model a config describes; write a run folder with its events and the grown model."""
    from esper.cli import resolve
    from esper.cli.recipe import growth_settings, read_recipe

    if resume not in (None, "auto"):
        raise typer.BadParameter(f"--resume {resume!r}: auto is all there is")
    recipe = read_recipe(config)
    settings = growth_settings(config, recipe)
    resolve.see_folder(config)

    import torch  # takes seconds: a mistake in the config is told before

    from esper.nissa.live import LiveView
    from esper.tolaria.trainer import Trainer

    folder = run_dir or Path(recipe.run_dir or Path("runs") / config.stem)
    torch.manual_seed(recipe.seed)
    model = resolve.call(recipe.model)
    optimizer = resolve.call(recipe.optimizer, model.parameters())
    with LiveView(plain=plain or None) as view:
        trainer = Trainer(
            model,
            optimizer,
            resolve.loss_of(recipe.loss),
            **resolve.batches_of(resolve.call(recipe.data), recipe.data),
            scheduler=resolve.call(recipe.scheduler, optimizer) if recipe.scheduler else None,
            metrics={name: resolve.metric_of(spec) for name, spec in recipe.metrics.items()},
            config=settings,
            run_dir=folder,
            epochs=recipe.epochs,
            seed=recipe.seed,
            on_event=view,
            checkpoints=folder / "checkpoints" if resume else None,
        )
        if resume is not None:
            trainer.resume()
        trainer.fit()
    trainer.growth.save(folder / "model")
    if json:
        print_json({**view.history.totals, "run": str(folder), "model": str(folder / "model")})
    else:
        print("\n".join(growth_lines(view.history)))
        print(f"run folder: {folder} (esper report {folder} draws it, esper why {folder} explains it)")
