"""What a checkpoint holds of a run: taken out of it, and put back into a fresh one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from esper.checkpoint.contents.batches import Batches
from esper.checkpoint.contents.fitting import require_same_parts
from esper.checkpoint.contents.growing import Growing
from esper.checkpoint.contents.optimizer_by_name import load_named_state, named_state
from esper.checkpoint.contents.randomness import Generator, capture_randomness, restore_randomness
from esper.checkpoint.format.run_state import GrowthState, ModuleState, Position, RunState
from esper.errors import ConfigError, StateError
from esper.saving import genome
from esper.surgery.isolation.acting import own_state


class Stateful(Protocol):
    """Anything that can be asked for its state and given it back: a scheduler, a scaler, a detector."""

    def state_dict(self) -> object:
        """Return it."""

    @property
    def load_state_dict(self) -> Callable[..., object]:
        """Take what ``state_dict`` gave."""


@dataclass
class Run:
    """The parts of a training run that a checkpoint holds.

    Args:
        model: Module that is trained; with ``growth``, the one it grows.
        optimizers: Optimizer, or several by name; every parameter of theirs belongs to ``model`` or
            ``modules``.
        growth: Growth of the run; None: it does not grow.
        modules: Other modules with state, by name: averaged copies, a loss that learns, a discriminator.
        others: Schedulers, a scaler and whatever else has ``state_dict`` and ``load_state_dict``, by name.
        batches: Loader that knows where the run is in its data.
        generators: Random generators of the run's own, by name; those of ``batches`` are known.
        config: Settings of the run, any plain values; compared on resume, and a difference is told.

    Raises:
        ConfigError: A part is not of its kind, or there is no optimizer.
    """

    model: nn.Module
    optimizers: Optimizer | Mapping[str, Optimizer]
    growth: Growing | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    others: Mapping[str, Stateful] = field(default_factory=dict)
    batches: Batches[Any] | None = None
    generators: Mapping[str, Generator] = field(default_factory=dict)
    config: Any = None  # compared, never read

    def __post_init__(self) -> None:
        kinds: tuple[type, ...] = (Optimizer, Mapping)
        if not isinstance(self.model, nn.Module) or not isinstance(self.optimizers, kinds):
            raise ConfigError(
                f"a run is a module and its optimizers; given are a {type(self.model).__name__} and a "
                f"{type(self.optimizers).__name__}"
            )
        if not self.optimizers:
            raise ConfigError(
                "a run without an optimizer has no steps to count; give one, or several by name"
            )
        self.host: nn.Module = self.model if self.growth is None else self.growth.host
        given = {"optimizer": self.optimizers} if isinstance(self.optimizers, Optimizer) else self.optimizers
        self.named: dict[str, Optimizer] = dict(given)
        self.trained: dict[str, nn.Module] = {"": self.host, **self.modules}
        self.streams: dict[str, Generator] = dict(self.generators)
        if self.batches is not None:
            self.streams |= {f"batches.{name}": one for name, one in self.batches.generators.items()}


@cache
def versions() -> dict[str, str]:
    """Return the versions on which bits depend."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "esper": version("esper-morph"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": python,
    }


def capture_run(run: Run, steps: int) -> RunState:
    """Return a run's state; tensors are the run's own, not copies."""
    growth = run.growth
    return {
        "steps": steps,
        "config": run.config,
        "growth_config": None if growth is None else growth.config.model_dump(mode="json"),
        "growth": None if growth is None else cast("GrowthState", growth.state_dict()),
        "modules": {name: module_state(module) for name, module in run.trained.items()},
        "optimizers": {name: named_state(one, run.trained, name) for name, one in run.named.items()},
        "others": {name: one.state_dict() for name, one in run.others.items()},
        "batches": None if run.batches is None else run.batches.state_dict(),
        "randomness": capture_randomness(run.streams),
    }


def module_state(module: nn.Module) -> ModuleState:
    """Return what a module knows: its state, buffers that are not part of it, and what is frozen."""
    state = own_state(module)  # a seed that is awake is kept with growth
    apart = {name: buffer for name, buffer in module.named_buffers() if name not in state}
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    owned = [name for name, _ in module.named_buffers() if name in state]
    return {"state": state, "buffers": apart, "owned": owned, "frozen": frozen}


def load_module_state(module: nn.Module, state: ModuleState, name: str) -> None:
    """Give a module back what it knew; its shapes fit by now.

    Raises:
        StateError: They do not.
    """
    try:
        module.load_state_dict(state["state"])
    except RuntimeError as error:
        raise StateError(f"the state does not fit {name or 'the model'}: {error}") from None
    buffers = dict(module.named_buffers())
    for key, value in state["buffers"].items():
        if key not in buffers or buffers[key].shape != value.shape:
            raise StateError(f"{name or 'the model'} has no buffer {key!r} of shape {tuple(value.shape)}")
        buffers[key].copy_(value)
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(key not in state["frozen"])


def restore_run(
    run: Run,
    state: RunState,
    bring: Callable[[RunState], RunState],
    told: bool = True,
) -> list[str]:
    """Bring a fresh run to a state: topology first, then everything by name, then random streams.

    Args:
        run: Run that is fresh.
        state: State as it was saved.
        bring: Function asked for the rest of the state once shapes fit.
        told: Whether to name settings that differ.

    Returns:
        What is not as it was, in words.

    Raises:
        StateError: The state is of another run.
    """
    require_same_parts(run, state)
    different = changed("config", state["config"], run.config) if told else []
    try:
        if run.growth is not None:
            settings = run.growth.config.model_dump(mode="json")
            different += changed("growth's config", state["growth_config"], settings) if told else []
            run.growth.load_state_dict(cast("GrowthState", state["growth"]))
        return different + _restored(run, bring(state))
    except StateError:
        raise
    except Exception as error:  # what the user's own load_state_dict raises, or a state that lies
        raise StateError(
            f"the state does not fit this run: {type(error).__name__}: {error}; build the run anew before it "
            "is used"
        ) from error


def _restored(run: Run, state: RunState) -> list[str]:
    """Give every part its state; shapes fit by now."""
    for name, module in run.trained.items():
        load_module_state(module, state["modules"][name], name)
    for name, optimizer in run.named.items():
        load_named_state(optimizer, state["optimizers"][name], run.trained, name)
    for name, other in run.others.items():
        other.load_state_dict(state["others"][name])
    if run.batches is not None:
        run.batches.load_state_dict(cast("Position", state["batches"]))
    return restore_randomness(state["randomness"], run.streams)


def changed(where: str, saved: object, given: object) -> list[str]:
    """Name every setting that is not as it was."""
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        keys = [*saved, *(key for key in given if key not in saved)]
        return [line for key in keys for line in changed(f"{where}.{key}", saved.get(key), given.get(key))]
    return [] if saved == given else [f"{where} was {saved!r} and is {given!r}"]


def genome_of(run: Run) -> bytes:
    """Write what grew as a saved model's genome does, and beside it the seeds that are awake."""
    growth = run.growth
    recipe = json.loads(genome.encode(run.host, [] if growth is None else growth.plans))
    recipe["seeds"] = [] if growth is None else growth.awake()
    recipe["gates"] = None if growth is None else growth.gates()
    return json.dumps(recipe, indent=1, allow_nan=False).encode()


def summary_of(run: Run) -> dict[str, object]:
    """Return the line a table shows of a run."""
    seeds: list[dict[str, object]] = [] if run.growth is None else run.growth.awake()
    batches = run.batches
    return {
        "model": type(run.host).__name__,
        "parameters": sum(parameter.numel() for parameter in run.host.parameters()),
        "grown": 0 if run.growth is None else len(run.growth.plans),
        "awake": [f"{seed['site']} {seed['stage']}" for seed in seeds],
        "epoch": None if batches is None else batches.epoch,
        "batch": None if batches is None else batches.index,
    }
