"""What each process of a run knows alone, and how it travels to the one that writes checkpoints, and back.

Models, optimizers and growth are the same everywhere, so the first process's are kept. Random streams, the
position in the data, the latest batches and buffers that nobody averages are each process's own.
"""

from __future__ import annotations

import json
import struct
from hashlib import blake2b
from typing import cast

import safetensors.torch
import torch

from esper.checkpoint.format.encoding import Unpacking
from esper.checkpoint.format.manifest import packed, safetensors_chunks
from esper.checkpoint.format.run_state import GrowthState, ModuleState, OwnState, Position, RunState, Streams
from esper.errors import CheckpointError

GROWTH = ("batches", "trial", "others")  # of a growth's state: what it saw last, kernels' own statistics

EVIDENCE = ("batches", "coming")  # likewise, of what early growth keeps for its next event


def own_part(state: RunState) -> OwnState:
    """Return the part of a run's state that other processes do not share."""
    growth = state["growth"]
    return {
        "growth": None if growth is None else {name: growth[name] for name in GROWTH if name in growth},
        "evidence": evidence_of(growth),
        "buffers": {name: buffers_of(module) for name, module in state["modules"].items()},
        "others": state["others"],
        "batches": state["batches"],
        "randomness": state["randomness"],
    }


def evidence_of(growth: GrowthState | None) -> dict[str, object]:
    """Return the batches of its own that a process has kept for the next event of early growth."""
    early = None if growth is None else growth.get("early")
    return {} if early is None else {n: v for n, v in early["evidence"].items() if n in EVIDENCE}


def buffers_of(module: ModuleState) -> dict[str, object]:
    """Return a module's buffers that are part of its state."""
    return {name: module["state"][name] for name in module.get("owned", ())}


def to_bytes(value: object) -> bytes:
    """Write a nested state: the length of its JSON, the JSON, its tensors.

    Raises:
        CheckpointError: It holds something that no checkpoint can.
    """
    skeleton, tensors = packed(value)
    text = json.dumps(skeleton).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(safetensors_chunks(tensors))


def from_bytes(data: bytes) -> object:
    """Read what :func:`to_bytes` wrote."""
    (length,) = struct.unpack("<Q", data[:8])
    tensors = safetensors.torch.load(data[8 + length :])
    return Unpacking(tensors).unpack(json.loads(data[8 : 8 + length]))


def joined(state: RunState, parts: list[bytes]) -> RunState:
    """Return the state with every process's own part in it.

    Raises:
        CheckpointError: A process could not say its own.
    """
    for rank, part in enumerate(parts):
        if not part:
            raise CheckpointError(f"process {rank} holds something that no checkpoint can keep; see its log")
    processes = [cast("OwnState", from_bytes(part)) for part in parts]
    return {**state, "processes": processes}


def adapted(state: RunState, rank: int, world: int, length: int | None) -> tuple[RunState, list[str]]:
    """Return a saved state as this process shall take it.

    The same number of processes go on where each of them was. Another number goes on from the same model, at
    the same share of the epoch: the newcomers have streams of their own, derived from the first one's.

    Args:
        state: State as it was saved.
        rank: Number of this process, from 0.
        world: Number of processes now.
        length: Batches of an epoch now; None: not known.

    Returns:
        The state, and what is not as it was, in words.
    """
    parts = state.get("processes") or [own_part(state)]
    shared = cast("RunState", {name: value for name, value in state.items() if name != "processes"})
    before = len(parts)
    part: OwnState = parts[rank if rank < before else 0]
    if before != world:
        part = {**part, "batches": moved(part["batches"], length)}
    if rank >= before:
        part = {**part, "randomness": reseeded(part["randomness"], rank)}
    growth: GrowthState | None = shared["growth"]
    if growth is not None and part["growth"] is not None:
        growth = cast("GrowthState", {**growth, **part["growth"]})
    if evidence := part.get("evidence"):
        assert growth is not None  # it is early growth's own
        early = growth["early"]
        assert early is not None
        growth = {**growth, "early": {**early, "evidence": {**early["evidence"], **evidence}}}
    modules: dict[str, ModuleState] = {
        name: {**module, "state": {**module["state"], **part["buffers"].get(name, {})}}
        for name, module in shared["modules"].items()
    }
    lines = [] if before == world else [f"there were {before} processes and are {world}"]
    adapted_state: RunState = {
        **shared,
        "growth": growth,
        "modules": modules,
        "others": part["others"],
        "batches": part["batches"],
        "randomness": part["randomness"],
    }
    return adapted_state, lines


def moved(position: Position | None, length: int | None) -> Position | None:
    """Return a position in the data as far into an epoch of another length."""
    if position is None or not length or not position.get("length"):
        return position
    return {**position, "index": position["index"] * length // position["length"]}


def reseeded(streams: Streams, rank: int) -> Streams:
    """Return random streams for a process that was not there: torch's, by the first one's and the rank."""
    seed = blake2b(streams["torch"].numpy().tobytes() + struct.pack("<q", rank), digest_size=7).digest()
    fresh = torch.Generator().manual_seed(int.from_bytes(seed))
    return {**streams, "torch": fresh.get_state()}
