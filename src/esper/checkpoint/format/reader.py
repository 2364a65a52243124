"""Find the newest checkpoint that verifies, and read it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from esper.checkpoint.format.manifest import (
    GENOME,
    PARTS,
    Manifest,
    decode_state,
    read_manifest,
    read_part,
    step_of,
)
from esper.checkpoint.format.run_state import RunState
from esper.errors import CheckpointError, StateError, StoreError
from esper.storage.protocol import Storage


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A sound checkpoint, read."""

    manifest: Manifest
    genome: bytes  # JSON: shapes before growth, what grew, the seeds that were awake
    state: RunState


def steps_kept(storage: Storage) -> list[str]:
    """List the checkpoints, oldest first; whatever else lies there is not ours.

    Raises:
        StateError: The storage cannot be listed.
    """
    return sorted(
        (name for name in storage.names() if step_of(name) is not None), key=lambda n: step_of(n) or 0
    )


def sound(storage: Storage, name: str) -> Manifest:
    """Verify one checkpoint, part by part.

    Raises:
        CheckpointError: It is damaged; the message names the part.
        StateError: It is of a version to come, or the storage does not answer.
    """
    manifest = read_manifest(storage, name)
    for part in PARTS:
        read_part(storage, manifest, part)
    return manifest


def sound_among(storage: Storage, names: Iterable[str]) -> dict[str, Manifest]:
    """Verify checkpoints; return the manifests of those that are sound.

    Raises:
        StoreError: The storage does not answer: which are sound, nobody knows.
    """
    found: dict[str, Manifest] = {}
    for name in names:
        try:
            found[name] = sound(storage, name)
        except StoreError:
            raise
        except StateError:
            continue  # latest() and the command line tell why
    return found


def read(storage: Storage, name: str) -> Checkpoint:
    """Verify one checkpoint and read it.

    Raises:
        CheckpointError: It is damaged; the message names the part.
        StateError: It is of a version to come, or the storage does not answer.
    """
    manifest = read_manifest(storage, name)
    parts = {part: read_part(storage, manifest, part) for part in PARTS}
    return Checkpoint(manifest, parts[GENOME], decode_state(manifest, parts))


def newest(
    storage: Storage, tell: Callable[[str], None], check: Callable[[Checkpoint], None] | None = None
) -> Checkpoint | None:
    """Read the newest checkpoint that verifies, and tell which were passed over and why.

    Args:
        storage: Storage of checkpoints.
        tell: Function told in words which were passed over.
        check: Function asked besides whether one is sound; raises ``CheckpointError`` where it is not.

    Raises:
        StateError: The storage cannot be listed, does not answer, or holds a checkpoint of a version to come.
            Who stepped back past one of those would go on from an older one, and delete it.
    """
    for name in reversed(steps_kept(storage)):
        try:
            found = read(storage, name)
            if check is not None:
                check(found)
            return found
        except CheckpointError as error:
            tell(f"a damaged checkpoint was passed over: {error}")
    return None
