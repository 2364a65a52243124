"""From a config to a trainer that is ready: what ``esper train`` runs, for whoever runs it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from esper.batches.share import Share
from esper.checkpoint import FolderStorage, Storage
from esper.cli.run import resolve
from esper.cli.run.recipe import Call, Recipe, growth_settings, read_recipe
from esper.cli.run.run_folder import CHECKPOINTS
from esper.cli.run.seeding import seed_all
from esper.cli.run.settings import settings_of
from esper.contracts import Observer, ignore
from esper.distributed.launch import join, launched, replicated
from esper.errors import ConfigError
from esper.nissa.run.journal import RunJournal
from esper.tolaria.trainer import Trainer

SCHEDULER = "a torch.optim.lr_scheduler.LRScheduler"


def as_it_is(storage: Storage) -> Storage:
    """Put nothing around a storage."""
    return storage


def open_session(
    config: Path,
    run_dir: Path,
    *,
    epochs: int | None = None,
    growth: Mapping[str, Mapping[str, object]] | None = None,
    keep: bool = True,
    every: int | None = None,
    wrap: Callable[[Storage], Storage] = as_it_is,
    on_event: Observer = ignore,
) -> Trainer:
    """Make the trainer of ``esper train CONFIG``; it has not begun.

    Where torchrun has started several of this process, they train together: each takes its rows of every
    batch, and gradients are averaged.

    Args:
        config: Path of the YAML file.
        run_dir: Path of the folder to write.
        epochs: Number of epochs; None: the config's.
        growth: Sections of settings over the config's, by name.
        keep: True to keep checkpoints, in the run folder.
        every: Optimizer steps between checkpoints; None: from their measured cost.
        wrap: Function put around the storage of checkpoints.
        on_event: Function called with every event.

    Raises:
        ConfigError: The config, or what it names, is wrong.
    """
    recipe = overridden(read_recipe(config), growth or {}, epochs)
    settings = growth_settings(config, recipe)
    resolve.see_folder(config, recipe)
    seed_all(recipe.seed)
    model = resolve.called("model", recipe.model, nn.Module, "an nn.Module")
    data = resolve.batches_of(resolve.call(recipe.data, key="data"), recipe.data)
    if launched():
        rank, world = join()
        model, data["train"] = replicated(model), Share(data["train"], rank, world)
    optimizer = optimizer_of(recipe.optimizer, model)
    asked = settings_of(config, recipe, settings, data)
    return Trainer(
        model,
        optimizer,
        resolve.loss_of(recipe.loss),
        train=data["train"],
        val=data["val"],
        probe=data["probe"],
        scheduler=scheduler_of(recipe.scheduler, optimizer),
        metrics={name: resolve.metric_of(spec, f"metrics.{name}") for name, spec in recipe.metrics.items()},
        config=settings,
        run_dir=journal_of(run_dir, asked),
        epochs=recipe.epochs,
        seed=recipe.seed,
        on_event=on_event,
        checkpoints=wrap(FolderStorage(run_dir / CHECKPOINTS)) if keep else None,
        every=every or cadence_of(recipe),
        keep=3 if recipe.checkpoints is None else recipe.checkpoints.keep,
        milestones=every is None,
        settings=asked,
    )


def overridden(recipe: Recipe, growth: Mapping[str, Mapping[str, object]], epochs: int | None) -> Recipe:
    """Return a recipe with sections of settings over its own, and another number of epochs where given."""
    sections = {name: {**recipe.growth.get(name, {}), **section} for name, section in growth.items()}
    update = {"growth": {**recipe.growth, **sections}, "epochs": epochs or recipe.epochs}
    return recipe.model_copy(update=update)


def journal_of(run_dir: Path, asked: Mapping[str, object]) -> RunJournal | Path:
    """Open the run's journal, with an id and a digest of what it is asked to do; the first process does.

    Raises:
        RunError: Another run is in the folder, or it cannot be written.
    """
    if launched() and os.environ.get("RANK", "0") != "0":
        return run_dir
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=repr).encode()).hexdigest()[:16]
    return RunJournal(run_dir, run=secrets.token_hex(8), config=digest)


def cadence_of(recipe: Recipe) -> int | timedelta | None:
    """Return how often the config wants checkpoints; None: from their measured cost."""
    wanted = recipe.checkpoints
    if wanted is None:
        return None
    return wanted.every_steps or (
        None if wanted.every_seconds is None else timedelta(seconds=wanted.every_seconds)
    )


def optimizer_of(spec: Call, model: nn.Module) -> Optimizer:
    """Make a recipe's optimizer of a model's parameters."""
    needed = "a torch.optim.Optimizer"
    return resolve.called("optimizer", spec, Optimizer, needed, model.parameters())


def scheduler_of(spec: Call | None, optimizer: Optimizer) -> LRScheduler | None:
    """Make a recipe's scheduler."""
    if spec is None:
        return None
    made = resolve.called("scheduler", spec, LRScheduler, SCHEDULER, optimizer)
    if type(made).__module__ == LRScheduler.__module__:  # one of the user's own may count its calls
        rehearse(spec, optimizer)
    return made


def rehearse(spec: Call, optimizer: Optimizer) -> None:
    """Take a scheduler's first steps on an optimizer that stands in: step_size=0 divides only then.

    Raises:
        ConfigError: It raises.
    """
    params = [{**group, "params": [torch.zeros(1, requires_grad=True)]} for group in optimizer.param_groups]
    for group in params:
        group.pop("initial_lr", None)
    stand_in = SGD(params, lr=1.0)
    trial = resolve.called("scheduler", spec, LRScheduler, SCHEDULER, stand_in)
    try:
        stand_in.step()
        if isinstance(trial, ReduceLROnPlateau):
            trial.step(0.0)
        else:
            trial.step()
    except Exception as error:  # whatever its arithmetic raises
        raise ConfigError(f"scheduler: {spec.call} raised {resolve.told(error)} at its first step") from error
