"""What a checkpoint holds of a run: taken out of it, and put back into a fresh one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from esper.contracts import Stage
from esper.errors import ConfigError, StateError, nearest
from esper.tolaria import genome
from esper.tolaria.checkpoint.batches import Batches
from esper.tolaria.checkpoint.encoding import DTYPES
from esper.tolaria.checkpoint.named import load_named_state, named_state
from esper.tolaria.checkpoint.randomness import Generator, capture_randomness, restore_randomness
from esper.tolaria.growth import Growth


class Stateful(Protocol):
    """Anything that can be asked for its state and given it back: a scheduler, a scaler, a detector."""

    def state_dict(self) -> Any:
        """Return it."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Take it back."""


@dataclass
class Run:
    """The parts of a training run that a checkpoint holds.

    Args:
        model: What is trained; with ``growth``, the model it grows.
        optimizers: One, or several by name; every parameter of theirs belongs to ``model`` or ``modules``.
        growth: Of a growing run.
        modules: Other modules with state, by name: averaged copies, a loss that learns, a discriminator.
        others: Whatever else has ``state_dict`` and ``load_state_dict``, by name: schedulers, a scaler.
        batches: Where the run is in its data.
        generators: Random generators of the run's own, by name; those of ``batches`` are known.
        config: The run's own settings, any plain values; compared on resume, and a difference is told.
    """

    model: nn.Module
    optimizers: Optimizer | Mapping[str, Optimizer]
    growth: Growth | None = None
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    others: Mapping[str, Stateful] = field(default_factory=dict)
    batches: Batches | None = None
    generators: Mapping[str, Generator] = field(default_factory=dict)
    config: Any = None

    def __post_init__(self) -> None:
        kinds: tuple[Any, ...] = (Optimizer, Mapping)
        if not isinstance(self.model, nn.Module) or not isinstance(self.optimizers, kinds):
            raise ConfigError(
                f"a run is a module and its optimizers; given are a {type(self.model).__name__} and a "
                f"{type(self.optimizers).__name__}"
            )
        if not self.optimizers:
            raise ConfigError(
                "a run without an optimizer has no steps to count; give one, or several by name"
            )
        self.host: nn.Module = self.model if self.growth is None else self.growth.morphable.host
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


def capture_run(run: Run, steps: int) -> dict[str, Any]:
    """Return a run's state; tensors are the run's own, not copies."""
    growth = run.growth
    return {
        "steps": steps,
        "config": run.config,
        "growth_config": None if growth is None else growth.config.model_dump(mode="json"),
        "growth": None if growth is None else growth.state_dict(),
        "modules": {name: module_state(module) for name, module in run.trained.items()},
        "optimizers": {name: named_state(one, run.trained, name) for name, one in run.named.items()},
        "others": {name: one.state_dict() for name, one in run.others.items()},
        "batches": None if run.batches is None else run.batches.state_dict(),
        "randomness": capture_randomness(run.streams),
    }


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return what a module knows: its state, buffers that are not part of it, and what is frozen."""
    state = dict(module.state_dict())
    apart = {name: buffer for name, buffer in module.named_buffers() if name not in state}
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    owned = [name for name, _ in module.named_buffers() if name in state]
    return {"state": state, "buffers": apart, "owned": owned, "frozen": frozen}


def load_module_state(module: nn.Module, state: Mapping[str, Any], name: str) -> None:
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


def require_same_model(run: Run, recipe: bytes, name: str) -> None:
    """Let a run take no checkpoint of another model; asked before anything is changed.

    Raises:
        StateError: It is of another one; the message names the first tensor.
    """
    growth = run.growth
    if growth is not None and (growth.steps or growth.plans):
        return  # growth itself refuses a run that has begun
    otherwise = f"{name} is of another model, and this {type(run.host).__name__} does not fit it"
    genome.require_fit(genome.decode(recipe)[0], genome.shapes_of(run.host), otherwise)


def unkeepable(run: Run) -> list[str]:
    """Name what no checkpoint can hold, before the first is due; it holds dense tensors of ordinary types."""
    found = []
    for prefix, module in run.trained.items():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            if value.layout is not torch.strided or value.is_meta or value.dtype not in DTYPES:
                what = "on the meta device" if value.is_meta else f"{value.layout}, {value.dtype}"
                path = ".".join(filter(None, (prefix, name)))
                found.append(
                    f"no checkpoint can be written as long as {path!r} is a tensor that is {what}: keep it "
                    "dense, or out of the module's buffers"
                )
    return found


def restore_run(
    run: Run,
    state: Mapping[str, Any],
    bring: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    told: bool = True,
) -> list[str]:
    """Bring a fresh run to a state: topology first, then everything by name, then random streams.

    Args:
        run: Fresh.
        state: As it was saved.
        bring: Asked for the rest of the state once shapes fit.
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
            run.growth.load_state_dict(state["growth"])
        return different + _restored(run, bring(state))
    except StateError:
        raise
    except Exception as error:  # what the user's own load_state_dict raises, or a state that lies
        raise StateError(
            f"the state does not fit this run: {type(error).__name__}: {error}; build the run anew before it "
            "is used"
        ) from error


def require_same_parts(run: Run, state: Mapping[str, Any]) -> None:
    """Compare which parts a run and a state have; nothing is changed.

    Raises:
        StateError: They have others.
    """
    if (state["growth"] is None) is not (run.growth is None):
        has, lacks = ("run", "checkpoint") if state["growth"] is None else ("checkpoint", "run")
        raise StateError(f"the {has} has a growth, the {lacks} has none; give both the same parts")
    _same_names("modules", state["modules"], run.trained)
    _same_names("optimizers", state["optimizers"], run.named)
    _same_names("others", state["others"], run.others)
    if (state["batches"] is None) is not (run.batches is None):
        raise StateError("either the run or the checkpoint has no batches; give both the same parts")
    saved = state["randomness"]["generators"]
    if saved.keys() != run.streams.keys():
        raise StateError(
            f"the state has the generators {sorted(saved)}, the run has {sorted(run.streams)}; give the run "
            "those it had"
        )


def _restored(run: Run, state: Mapping[str, Any]) -> list[str]:
    """Give every part its state; shapes fit by now."""
    for name, module in run.trained.items():
        load_module_state(module, state["modules"][name], name)
    for name, optimizer in run.named.items():
        load_named_state(optimizer, state["optimizers"][name], run.trained, name)
    for name, other in run.others.items():
        other.load_state_dict(state["others"][name])
    if run.batches is not None:
        run.batches.load_state_dict(state["batches"])
    return restore_randomness(state["randomness"], run.streams)


def _same_names(what: str, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in saved:
        if name not in given:
            raise StateError(f"the checkpoint has {what} {name!r}, the run does not; {nearest(name, given)}")
    if extra := sorted(given.keys() - saved.keys()):
        raise StateError(
            f"the run has {what} {extra[0]!r}, the checkpoint does not; {nearest(extra[0], saved)}"
        )


def changed(where: str, saved: Any, given: Any) -> list[str]:
    """Name every setting that is not as it was."""
    if isinstance(saved, Mapping) and isinstance(given, Mapping):
        keys = [*saved, *(key for key in given if key not in saved)]
        return [line for key in keys for line in changed(f"{where}.{key}", saved.get(key), given.get(key))]
    return [] if saved == given else [f"{where} was {saved!r} and is {given!r}"]


def genome_of(run: Run) -> bytes:
    """Write what grew as a saved model's genome does, and beside it the seeds that are awake."""
    growth = run.growth
    recipe = json.loads(genome.encode(run.host, [] if growth is None else growth.plans))
    recipe["seeds"] = [] if growth is None else seeds_of(growth)
    recipe["gates"] = (
        None if growth is None else {"looks": growth.parts.gate.looks, "kept": growth.events_kept}
    )
    return json.dumps(recipe, indent=1, allow_nan=False).encode()


def seeds_of(growth: Growth) -> list[dict[str, Any]]:
    """List the seeds that are not dormant: stage, α, evidence."""
    layout, trial = growth.morphable.layout, growth.orchestrator.trial
    found = []
    for seed in range(len(layout.stage)):
        stage = layout.stage_of(seed)
        if stage is Stage.DORMANT:
            continue
        mine = trial is not None and trial.seed == seed
        decision = trial.decision if mine and trial is not None else None
        gain = float(layout.gain[seed])
        found.append(
            {
                "seed": seed,
                "site": growth.morphable.site_of(seed),
                "stage": stage.name,
                "alpha": float(layout.alpha[seed]),
                "gain": gain if np.isfinite(gain) else None,
                "faults": int(layout.faults[seed]),
                "decision": None if decision is None else decision.id,
                "width": None if decision is None else decision.width,
            }
        )
    return found


def summary_of(run: Run) -> dict[str, Any]:
    """Return the line a table shows of a run."""
    seeds: list[dict[str, Any]] = [] if run.growth is None else seeds_of(run.growth)
    batches = run.batches
    return {
        "model": type(run.host).__name__,
        "parameters": sum(parameter.numel() for parameter in run.host.parameters()),
        "grown": 0 if run.growth is None else len(run.growth.plans),
        "awake": [f"{seed['site']} {seed['stage']}" for seed in seeds],
        "epoch": None if batches is None else batches.epoch,
        "batch": None if batches is None else batches.index,
    }
