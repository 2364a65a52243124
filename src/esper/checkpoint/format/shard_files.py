"""Sharded tensors in a storage: every process writes its part, any number of processes read them back.

A shard is a group of its own; the checkpoint that owns it lists it with its digest and is written afterwards,
so a shard that no checkpoint lists is nobody's. torch.distributed.checkpoint plans what is written and read
where, also for another number of processes. Its files and the plans it exchanges are pickled: they are not
used.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from esper.checkpoint.format.encoding import DTYPES
from esper.checkpoint.format.manifest import Manifest, digest, safetensors_chunks
from esper.checkpoint.format.run_state import Chunk, ShardFacts, Table, TensorFacts
from esper.distributed.collectives import Peers
from esper.errors import CheckpointError, StateError
from esper.storage.protocol import Storage, part_of

PART = "tensors.safetensors"
SHARDS = "shards"  # of a checkpoint's summary: what lies beside it
TYPES = {text: dtype for dtype, text in DTYPES.items()}
_SHARD = re.compile(r"step-\d{8,}-[0-9a-f]{8}-\d{5}")
T = TypeVar("T")


def write_shards(storage: Storage, name: str, pieces: Mapping[str, DTensor], peers: Peers) -> Table:
    """Write every process's part of sharded tensors; collective.

    Returns:
        What the checkpoint ``name``, which rank 0 writes afterwards, must hold for :func:`read_shards`.

    Raises:
        CheckpointError: A process could not write; all of them raise.
    """
    # One that is there already stays whole.
    attempt = peers.broadcast_bytes(secrets.token_hex(4).encode()).decode()
    shard = f"{name}-{attempt}-{peers.rank:05d}"

    def write() -> Table:
        mine = {path: piece for path, piece in pieces.items() if is_first(piece)}
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(mine)
        tensors: dict[str, Tensor] = {}
        table: Table = {"shards": {}, "tensors": {}}
        for item in planner.create_local_plan().items:
            data, path = item.tensor_data, item.index.fqn
            assert data is not None
            if not math.prod(data.chunk.sizes):
                continue
            value = planner.resolve_data(item)
            assert isinstance(value, Tensor)
            tensors[path] = value.to("cpu").contiguous()
            chunk: Chunk = {"shard": shard, "at": list(data.chunk.offsets), "shape": list(data.chunk.sizes)}
            facts: TensorFacts = {"dtype": DTYPES[value.dtype], "shape": list(data.size), "chunks": [chunk]}
            table["tensors"][path] = facts
        chunks = safetensors_chunks(tensors)
        table["shards"][shard] = {"size": sum(len(c) for c in chunks), "sha256": digest(chunks)}
        storage.put(shard, {PART: chunks})
        return table

    tables = peers.gather_bytes(json.dumps(together(peers, write)).encode())
    merged = together(peers, lambda: joined(json.loads(text) for text in tables))
    return json.loads(peers.broadcast_bytes(json.dumps(merged).encode()))


def joined(tables: Iterable[Table]) -> Table:
    """Join the tables of all processes.

    Raises:
        CheckpointError: Parts of a tensor are missing.
    """
    whole: Table = {"shards": {}, "tensors": {}}
    for table in tables:
        whole["shards"] |= table["shards"]
        for path, facts in table["tensors"].items():
            whole["tensors"].setdefault(path, {**facts, "chunks": []})["chunks"] += facts["chunks"]
    covered(whole)
    return whole


def covered(table: Table) -> None:
    """Refuse a table whose chunks do not make up their tensors: what none of them holds would be noise."""
    for path, facts in table["tensors"].items():
        if sum(math.prod(chunk["shape"]) for chunk in facts["chunks"]) != math.prod(facts["shape"]):
            raise CheckpointError(f"the shards do not hold all of {path!r}, or some of it twice")


def is_first(piece: DTensor) -> bool:
    """Tell whether this process writes its part: of processes that hold the same one, the first does."""
    coordinate = piece.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    spread = zip(coordinate, piece.placements, strict=True)
    return all(place == 0 for place, how in spread if how.is_replicate())


def read_shards(storage: Storage, table: Table, targets: Mapping[str, Tensor], peers: Peers) -> None:
    """Fill tensors, sharded in any way, from a checkpoint's shards; collective.

    A process reads the shards that hold parts of its own, and parses none before its digest holds.

    Raises:
        CheckpointError: A shard is missing or damaged; all processes raise, whichever found it.
    """

    def fill() -> None:
        covered(table)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(dict(targets), metadata_of(table), is_coordinator=True)
        holders = {
            (path, tuple(chunk["at"])): chunk["shard"]
            for path, facts in table["tensors"].items()
            for chunk in facts["chunks"]
        }
        wanted: dict[str, list[ReadItem]] = {}
        for item in planner.create_local_plan().items:
            index = item.storage_index
            wanted.setdefault(holders[index.fqn, tuple(index.offset or ())], []).append(item)
        for shard, items in wanted.items():
            tensors = parsed(storage, shard, table["shards"][shard])
            for item in items:
                value = tensors[item.storage_index.fqn]
                for axis, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    value = value.narrow(axis, start, length)
                target = planner.resolve_tensor(item).detach()
                planner.commit_tensor(item, target.copy_(value))

    together(peers, fill)


def verify_shards(storage: Storage, manifest: Manifest, peers: Peers) -> None:
    """Check a checkpoint's shards without reading what is in them, each process some; collective.

    A run asks before it rebuilds its shapes: from a damaged checkpoint it can still step back then.

    Raises:
        CheckpointError: One is missing or damaged; all processes raise, whichever found it.
    """

    def check() -> None:
        for facts in manifest.summary.get("shards", [])[peers.rank :: peers.world]:
            sealed(storage, facts["name"], facts)

    together(peers, check)


def metadata_of(table: Table) -> Metadata:
    """Tell torch.distributed.checkpoint what there is."""
    return Metadata(
        {
            path: TensorStorageMetadata(
                TensorProperties(TYPES[facts["dtype"]]),
                torch.Size(facts["shape"]),
                [
                    ChunkStorageMetadata(torch.Size(chunk["at"]), torch.Size(chunk["shape"]))
                    for chunk in facts["chunks"]
                ],
            )
            for path, facts in table["tensors"].items()
        }
    )


def sealed(storage: Storage, shard: str, facts: ShardFacts) -> bytes:
    """Read one shard.

    Raises:
        CheckpointError: It is missing, or has not the size and digest its checkpoint lists.
    """
    content = part_of(storage, shard, PART, most=facts["size"])
    if len(content) != facts["size"] or digest([content]) != facts["sha256"]:
        raise CheckpointError(f"{shard}: {PART} is damaged: its size or SHA-256 digest is another")
    return content


def parsed(storage: Storage, shard: str, facts: ShardFacts) -> dict[str, Tensor]:
    """Read one shard's tensors, once its digest holds.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        return safetensors.torch.load(sealed(storage, shard, facts))
    except SafetensorError as error:
        raise CheckpointError(f"{shard} is not in the format it claims: {error}") from error


def orphans(storage: Storage, listed: Iterable[Manifest]) -> list[str]:
    """Name the shards that none of the checkpoints lists: of attempts that failed, and of deleted ones.

    Rank 0 deletes them when it prunes, never while a checkpoint is written.
    """
    kept = {shard["name"] for manifest in listed for shard in manifest.summary.get("shards", [])}
    return [name for name in storage.names() if _SHARD.fullmatch(name) and name not in kept]


def together(peers: Peers, act: Callable[[], T]) -> T:
    """Do something in every process; what fails in one is refused in all of them, so that none waits.

    Raises:
        StateError: It failed here.
        CheckpointError: It failed in another process.
    """
    failed: StateError | OSError | None = None
    result: list[T] = []
    try:
        result.append(act())
    except (StateError, OSError) as error:
        failed = error
    if peers.all_ranks(failed is None):
        return result[0]
    if isinstance(failed, StateError):
        raise failed
    if failed is not None:
        raise CheckpointError(f"a shard could not be read or written: {failed}") from failed
    raise CheckpointError("another process could not read or write its part, so this one does not either")
