"""Checkpoints of sharded runs, for any number of processes.

The checkpoint is an ordinary one, which rank 0 writes last: what grew, settings, small state, and a table of
the tensors that lie in shards (``shards.py``). Reading begins with it: shapes are rebuilt from the genome,
then every tensor is found by its name.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from esper.checkpoint.contents.optimizer_by_name import load_named_state, named_state
from esper.checkpoint.contents.run import load_module_state, module_state, versions
from esper.checkpoint.format.manifest import Manifest, name_of, packed, parts_of
from esper.checkpoint.format.reader import Checkpoint, read
from esper.checkpoint.format.run_state import RunState, Table
from esper.checkpoint.format.shard_files import TYPES, read_shards, together, write_shards
from esper.distributed.collectives import ALONE, Peers
from esper.distributed.fsdp.reshard import spread
from esper.errors import StateError, nearest
from esper.storage.folder import FolderStorage
from esper.storage.protocol import Storage
from esper.surgery.isolation.acting import own_state

MARK = "sharded tensor"  # stands in the state where one belongs


def save_sharded(
    storage: Storage | str | Path,
    step: int,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    *,
    genome: bytes = b"{}",
    rest: object = None,
    peers: Peers = ALONE,
) -> Manifest:
    """Save a model and its optimizers from all processes; collective.

    Args:
        storage: Storage, or a folder that all share.
        step: Optimizer steps done.
        model: Module, sharded in whole, in part or not at all.
        optimizers: Optimizers, by name; state is kept under the names of parameters.
        genome: JSON of what grew, as ``esper.saving.genome`` writes it.
        rest: State of any other kind that is the same everywhere; rank 0's is kept.
        peers: Processes that save.

    Raises:
        CheckpointError: A process could not write; all of them raise, and nothing was saved.
    """
    held = opened(storage)
    left, pieces = extract_dtensors({"rest": rest, **state_of(model, optimizers)})
    state = cast("Mapping[str, object]", left)
    table = write_shards(held, name_of(step), pieces, peers)
    listed = {"shards": [{"name": name, **facts} for name, facts in table["shards"].items()]}
    manifest = Manifest(step, time.time(), versions(), {}, listed)

    def commit() -> None:
        if peers.rank == 0:
            skeleton, tensors = packed({**state, "table": table})
            held.put(manifest.name, parts_of(manifest, genome, skeleton, tensors))

    together(peers, commit)
    return manifest


def load_sharded(
    storage: Storage | str | Path,
    name: str,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    *,
    peers: Peers = ALONE,
) -> Checkpoint:
    """Bring a model, its shapes rebuilt from the genome before, to a checkpoint; collective.

    Args:
        storage: Storage, or the folder it was saved to.
        name: Name of the checkpoint.
        model: Module, sharded over any number of processes, or not at all.
        optimizers: Optimizers, by name, over the same parameters in the same groups.
        peers: Processes that load; as many as there are now.

    Returns:
        The checkpoint; ``state["rest"]`` is what was given to be kept.

    Raises:
        CheckpointError: A part is damaged; all processes raise, and none of them was changed.
        StateError: Shapes or names do not fit; likewise.
    """
    held = opened(storage)
    found = together(peers, lambda: read(held, name))
    table = found.state["table"]
    together(peers, lambda: refuse_unfit(found.state, model))
    targets = together(peers, lambda: targets_for(table, likes_of(model, optimizers)))
    read_shards(held, table, targets, peers)
    state = cast("RunState", laid_out(insert_dtensors(found.state, targets), likes_of(model, optimizers)))
    load_module_state(model, state["modules"][""], "")
    for label, optimizer in optimizers.items():
        load_named_state(optimizer, state["optimizers"][label], {"": model}, label)
    return Checkpoint(found.manifest, found.genome, state)


def state_of(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, object]:
    """Return state in the layout of ``esper.checkpoint.contents.run``; the model first, which reshards it."""
    modules = {"": module_state(model)}
    return {
        "modules": modules,
        "optimizers": {label: named_state(one, {"": model}, label) for label, one in optimizers.items()},
    }


def opened(storage: Storage | str | Path) -> Storage:
    """Return a storage; a folder is one."""
    return FolderStorage(storage) if isinstance(storage, str | Path) else storage


def extract_dtensors(state: object, path: str = "") -> tuple[object, dict[str, DTensor]]:
    """Take the sharded tensors out of a nested state; marks with their paths stay in their places."""
    if isinstance(state, DTensor):
        return {MARK: path}, {path: state}
    if not isinstance(state, Mapping):
        return state, {}
    parts = {
        key: extract_dtensors(value, f"{path}/{key}" if path else str(key)) for key, value in state.items()
    }
    return {key: left for key, (left, _) in parts.items()}, {
        name: piece for _, pieces in parts.values() for name, piece in pieces.items()
    }


def insert_dtensors(state: object, tensors: Mapping[str, Tensor]) -> object:
    """Put tensors where :func:`extract_dtensors` took them out."""
    if not isinstance(state, Mapping):
        return state
    if state.keys() == {MARK}:
        return tensors[state[MARK]]
    return {key: insert_dtensors(value, tensors) for key, value in state.items()}


def laid_out(state: object, likes: Mapping[str, Tensor], path: str = "") -> object:
    """Spread what was saved whole over the processes, where this model is sharded and that one was not."""
    if isinstance(state, Mapping):
        return {k: laid_out(v, likes, f"{path}/{k}" if path else str(k)) for k, v in state.items()}
    like = likes.get(path, likes.get(path.rpartition("/")[0]))
    return spread(state, like, None) if isinstance(like, DTensor) else state


def likes_of(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, Tensor]:
    """Return, by path in a state, the tensors that its tensors are laid out as."""
    likes = {f"modules//state/{key}": value for key, value in own_state(model).items()}
    for label in optimizers:
        likes |= {f"optimizers/{label}/state/{name}": p for name, p in model.named_parameters()}
    return likes


def refuse_unfit(state: RunState, model: nn.Module) -> None:
    """Refuse a checkpoint whose tensors have other names or shapes than the model's.

    Raises:
        StateError: They do not fit; the message names the first.
    """
    saved: dict[str, tuple[int, ...]] = {}
    for key, value in state["modules"][""]["state"].items():
        facts = state["table"]["tensors"][value[MARK]] if isinstance(value, Mapping) else None
        saved[key] = tuple(cast("Tensor", value).shape if facts is None else facts["shape"])
    given = {key: tuple(value.shape) for key, value in own_state(model).items()}
    for key in (*saved, *given):
        if key not in saved or key not in given:
            who, others = ("model", saved) if key in given else ("checkpoint", given)
            raise StateError(f"only the {who} has {key!r}; grow the model as it was; {nearest(key, others)}")
        if saved[key] != given[key]:
            raise StateError(
                f"{key!r} has shape {saved[key]} in the checkpoint and {given[key]} in the model; grow "
                "the model by the checkpoint's genome first"
            )


def targets_for(table: Table, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make room for a checkpoint's sharded tensors, laid out as this model is.

    Raises:
        StateError: An optimizer's state belongs to no parameter.
    """
    found = {}
    for path, facts in table["tensors"].items():
        like = likes.get(path, likes.get(path.rpartition("/")[0]))
        if like is None:
            raise StateError(f"the checkpoint has {path!r}, the run does not; {nearest(path, likes)}")
        found[path] = room(like, tuple(facts["shape"]), TYPES[facts["dtype"]])
    return found


def room(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor laid out as ``like`` where shapes agree, else with all of it everywhere."""
    if like.shape == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    empty = torch.empty(shape, dtype=dtype, device=like.device)
    if not isinstance(like, DTensor):
        return empty
    return DTensor.from_local(empty, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
