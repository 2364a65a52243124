"""A snapshot: a run's state, copied on the thread that trains, which goes on while it is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from esper.checkpoint.contents.run import Run, genome_of, summary_of, versions
from esper.checkpoint.format.manifest import Manifest, canonical, digest, packed
from esper.checkpoint.format.run_state import ListedShard
from esper.checkpoint.format.shard_files import SHARDS

State: TypeAlias = "tuple[Mapping[str, object], list[ListedShard]]"  # of a run, and the shards it lists


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run's state, copied."""

    manifest: Manifest
    genome: bytes
    skeleton: object  # JSON values, as ``encoding.py`` makes them
    tensors: Mapping[str, Tensor]
    stall: float  # seconds training stood still for it


def taken_of(
    run: Run,
    steps: int,
    metrics: Mapping[str, float | None],
    run_id: str,
    spare: Mapping[str, Tensor],
    state: Callable[[], State],
) -> Snapshot:
    """Copy a run.

    Args:
        run: Run to copy.
        steps: Optimizer steps it has done.
        metrics: Numbers that a table shows of it, by name; None: not finite.
        run_id: Id of the run.
        spare: Tensors that nobody needs any more; written over.
        state: Function that returns the run's state.

    Raises:
        StateError: It holds what no checkpoint can.
    """
    begun = time.perf_counter()
    with torch.no_grad():
        given, shards = state()
        skeleton, tensors = packed(given, spare)
    config = None if run.config is None else digest([canonical(packed(run.config)[0])])[:16]
    summary = {**summary_of(run), "run": run_id, "config": config, **({SHARDS: shards} if shards else {})}
    manifest = Manifest(steps, time.time(), versions(), metrics, summary)
    return Snapshot(manifest, genome_of(run), skeleton, tensors, time.perf_counter() - begun)
