"""The sharded tensors of a run's state: every process writes its own, and any number of processes read them.

A state goes without them, and a table says where they lie; where nothing is sharded, it stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from esper.checkpoint.contents.sharded import (
    extract_dtensors,
    insert_dtensors,
    laid_out,
    likes_of,
    refuse_unfit,
    targets_for,
)
from esper.checkpoint.format.manifest import Manifest
from esper.checkpoint.format.reader import sound_among, steps_kept
from esper.checkpoint.format.run_state import ListedShard, RunState
from esper.checkpoint.format.shard_files import (
    SHARDS,
    TYPES,
    orphans,
    read_shards,
    together,
    verify_shards,
    write_shards,
)
from esper.distributed.collectives import ALONE, Peers
from esper.distributed.model_wrapper import Wrapping
from esper.errors import StateError
from esper.storage.protocol import Storage

MODEL = "modules//"  # where the model's own tensors stand in a state


def save_shards(
    wrapping: Wrapping, storage: Storage, name: str, state: RunState
) -> tuple[RunState, list[ListedShard]]:
    """Write the tensors that lie in parts, each process its own; collective.

    Args:
        wrapping: Wrapping around the model.
        storage: Storage of checkpoints; shards that none of them lists are deleted first.
        name: Name of the checkpoint that will list them.
        state: State of the run.

    Returns:
        The state without them, and what the checkpoint's summary lists.
    """
    if not wrapping.sharded:
        return state, []
    if wrapping.peers.rank == 0:
        with suppress(StateError):  # a storage that does not answer says so when it is written to
            kept = sound_among(storage, steps_kept(storage)).values()
            for orphan in orphans(storage, kept):
                storage.delete(orphan)
    left, pieces = extract_dtensors(state)
    table = write_shards(storage, name, pieces, wrapping.peers)
    listed: list[ListedShard] = [
        {"name": shard, "size": facts["size"], "sha256": facts["sha256"]}
        for shard, facts in table["shards"].items()
    ]
    return {**cast("RunState", left), "table": table}, listed


def verify_listed(peers: Peers, storage: Storage, manifest: Manifest) -> None:
    """Check the shards a checkpoint lists, whoever wrote them; collective.

    Raises:
        CheckpointError: One is damaged; all processes raise.
    """
    if manifest.summary.get(SHARDS):
        verify_shards(storage, manifest, peers)


def load_shards(
    wrapping: Wrapping, storage: Storage, state: RunState, optimizers: Mapping[str, Optimizer]
) -> RunState:
    """Return a state with all its tensors, laid out as this model is; its shapes fit by now; collective.

    What was saved whole is spread over the processes, however many wrote it.

    Raises:
        StateError: They do not fit, or a part is damaged; all processes raise.
    """
    if "table" not in state and not wrapping.sharded:
        return state
    likes = likes_of(wrapping.host, optimizers)
    if "table" not in state:
        return cast("RunState", laid_out(state, likes))
    table = state["table"]
    together(wrapping.peers, lambda: refuse_unfit(state, wrapping.host))
    targets = together(wrapping.peers, lambda: targets_for(table, likes))
    read_shards(storage, table, targets, wrapping.peers)
    return cast("RunState", laid_out(insert_dtensors(state, targets), likes))


def gathered(storage: Storage, state: RunState) -> Mapping[str, object]:
    """Return the model's tensors of a sharded checkpoint, whole, in one process.

    Raises:
        CheckpointError: A shard is missing or damaged.
    """
    model, table = state["modules"][""]["state"], state["table"]
    paths = {path: facts for path, facts in table["tensors"].items() if path.startswith(MODEL)}
    targets: dict[str, Tensor] = {
        path: torch.empty(facts["shape"], dtype=TYPES[facts["dtype"]]) for path, facts in paths.items()
    }
    read_shards(storage, {**table, "tensors": paths}, targets, ALONE)
    return cast("Mapping[str, object]", insert_dtensors(model, targets))
