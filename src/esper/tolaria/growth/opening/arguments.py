"""Check the plain arguments of ``grow`` before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from torch import nn

from esper.arguments import items
from esper.errors import ConfigError, LossError, SurgeryError
from esper.nissa.run.journal import RunJournal
from esper.printable import quoted
from esper.surgery.optimizers.averages import copy_of
from esper.tolaria.growth.opening.request import Scheduler

MOST_STEPS = 10**8  # of a run


def listed(schedulers: object) -> list[Scheduler]:
    """Return the schedulers in a list; one that is given alone is meant.

    Raises:
        ConfigError: What is given has no ``step``.
    """
    if schedulers is None:  # as a loop says it that has none
        return []
    given = items("schedulers", schedulers) if isinstance(schedulers, Sequence) else [schedulers]
    for one in given:
        if not callable(getattr(one, "step", None)):
            raise ConfigError(
                f"schedulers={quoted(schedulers)}: a {type(one).__name__} has no step(); give them in a "
                "list, or leave it out"
            )
    return cast("list[Scheduler]", given)


def refuse_numbers(steps: object, seed: object) -> None:
    """Refuse a number of steps that no run has, and a seed that is none.

    Raises:
        ConfigError: With what was given.
    """
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    if steps is not None and not (whole and 1 <= steps <= MOST_STEPS):
        raise ConfigError(
            f"steps={quoted(steps)}; give the optimizer steps of the run, a count from 1 on, or None"
        )
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"seed={quoted(seed)}; give a whole number that is not negative")


def refuse_uncallable(**given: object) -> None:
    """Refuse what is to be called and cannot be.

    Raises:
        LossError: A loss.
        ConfigError: Anything else.
    """
    for name, one in given.items():
        if callable(one):
            continue
        said = f"{name}={quoted(one)}: a {type(one).__name__} cannot be called; "
        if name == "loss_fn":
            raise LossError(f"{said}give a function of model and batch that returns the loss")
        raise ConfigError(f"{said}give a function, or leave it out")


def refuse_scaler(scaler: object) -> None:
    """Refuse a scaler that scales nothing.

    Raises:
        ConfigError: It has no ``get_scale``.
    """
    if scaler is not None and not callable(getattr(scaler, "get_scale", None)):
        raise ConfigError(
            f"scaler={quoted(scaler)}: a {type(scaler).__name__} has no get_scale(); give the GradScaler, or "
            "leave it out"
        )


def refuse_folder(run_dir: object) -> None:
    """Refuse a run folder that is no path.

    Raises:
        ConfigError: With what was given.
    """
    if run_dir is not None and not isinstance(run_dir, (str, Path, RunJournal)):
        raise ConfigError(
            f"run_dir={quoted(run_dir)}: a {type(run_dir).__name__} is no path; give one, or leave it out"
        )


def averages(ema: object, model: nn.Module) -> list[nn.Module]:
    """Return the averaged copies of a model in a list; one that is given alone is meant.

    Raises:
        ConfigError: One is no module, is the model itself, or is of another model.
    """
    if ema is None:  # as a loop says it that has none
        return []
    several = isinstance(ema, Iterable) and not isinstance(ema, (nn.Module, str))
    given: list[nn.Module] = []
    for one in items("ema", ema) if several else [ema]:
        if not isinstance(one, nn.Module):
            raise ConfigError(
                f"ema={quoted(ema)}: a {type(one).__name__} is no module; give averaged copies "
                "in a list, AveragedModel(model) say, or leave it out"
            )
        if difference := differs(one, model):
            raise ConfigError(
                f"ema={type(one).__name__} is no copy of the model: {difference}; make it of this model, by "
                "AveragedModel(model) say, before esper.grow"
            )
        given.append(one)
    return given


def differs(average: nn.Module, model: nn.Module) -> str:
    """Say by which tensor an average differs from a model first; empty where it is a copy."""
    wanted = {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    try:
        copy = copy_of(average, wanted.keys())
    except SurgeryError:
        known = [{name for name, _ in one.named_parameters()} for one in (average, *average.children())]
        nearest = max(known, key=lambda names: len(names & wanted.keys()))
        return f"it has no {next((name for name in wanted if name not in nearest), 'such tensors')}"
    found = {name: tensor.shape for name, tensor in (*copy.named_parameters(), *copy.named_buffers())}
    if copy is model:
        return "it is the model itself"
    for name, shape in wanted.items():
        if found[name] != shape:
            return f"{name} is {tuple(found[name])} there and {tuple(shape)} in the model"
    return ""
