"""Whether a checkpoint fits a run: asked before anything of the run is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.checkpoint.format.encoding import DTYPES
from esper.checkpoint.format.run_state import RunState
from esper.errors import CheckpointError, SavedModelError, StateError, nearest
from esper.saving import genome

if TYPE_CHECKING:
    from esper.checkpoint.contents.run import Run


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


def require_own_shapes(run: Run, recipe: bytes, state: RunState, name: str) -> None:
    """Refuse a checkpoint whose tensors are not what its own genome makes of this run's model.

    Raises:
        CheckpointError: They are not: it is no sound checkpoint of this model.
    """
    if "rest" in state:
        raise CheckpointError(f"{name} holds a model and its optimizers, and no run; load_sharded() loads it")
    shapes, plans = genome.decode(recipe)
    growth = run.growth
    if "table" in state or (growth is not None and (growth.steps or growth.plans)):
        return  # its tensors lie elsewhere; or growth itself refuses a run that has begun
    if shapes != genome.shapes_of(run.host):
        return  # of another model, which is no damage
    names = genome.aliases(run.host)
    held = state["modules"][""]["state"]
    given = {key: list(value.shape) if isinstance(value, Tensor) else [] for key, value in held.items()}
    try:
        for plan in plans:
            genome.resize(shapes, plan, names, grow=True)
        genome.require_fit(shapes, given, f"{name} contradicts itself")
    except SavedModelError as error:
        raise CheckpointError(str(error)) from None


def require_same_parts(run: Run, state: RunState) -> None:
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


def _same_names(what: str, saved: Mapping[str, object], given: Mapping[str, object]) -> None:
    for name in saved:
        if name not in given:
            raise StateError(f"the checkpoint has {what} {name!r}, the run does not; {nearest(name, given)}")
    if extra := sorted(given.keys() - saved.keys()):
        raise StateError(
            f"the run has {what} {extra[0]!r}, the checkpoint does not; {nearest(extra[0], saved)}"
        )
