"""What a storage's checkpoints mean to a run: the one to go on from, or those of another run, in its way."""

from __future__ import annotations

import json
from collections.abc import Callable

from esper.checkpoint.contents.run_shards import verify_listed
from esper.checkpoint.format.manifest import name_of, step_of
from esper.checkpoint.format.reader import Checkpoint, read, steps_kept
from esper.distributed.collectives import Peers
from esper.errors import CheckpointError, ConfigError, StateError
from esper.storage.protocol import Storage

NONE, UNKNOWN = -1, -2  # no step
VERDICTS = ("sound", "damaged", "refused")


def newest_of_all(
    storage: Storage,
    peers: Peers,
    tell: Callable[[str], None],
    check: Callable[[Checkpoint], None],
) -> Checkpoint | None:
    """Read the newest checkpoint that every process finds sound, stepping back together.

    Raises:
        StateError: They do not find the same.
    """
    names = steps_kept(storage) if peers.rank == 0 else []
    for name in reversed(json.loads(peers.broadcast_bytes(json.dumps(names).encode()))):
        found: Checkpoint | None = None
        failure: StateError | None = None
        try:
            found = read(storage, name)
            check(found)
        except StateError as error:
            failure = error
        verdicts = [VERDICTS[v] for (v,) in peers.all_gather_ints([VERDICTS.index(verdict_on(failure))])]
        if len(set(verdicts)) > 1:  # who stepped back would delete what the others find sound
            raise StateError(
                f"to the processes, in the order of ranks, {name} is {', '.join(verdicts)}; do all of "
                f"them see the same storage?{'' if failure is None else f' {failure}'}"
            )
        try:
            if found is None:
                raise failure or CheckpointError(f"{name} holds nothing")
            verify_listed(peers, storage, found.manifest)
        except CheckpointError as error:
            tell(f"a damaged checkpoint was passed over: {error}")
            continue
        return found
    return None


def verdict_on(failure: StateError | None) -> str:
    """Say what became of reading a checkpoint."""
    if failure is None:
        return "sound"
    return "damaged" if isinstance(failure, CheckpointError) else "refused"


def require_none(storage: Storage, peers: Peers) -> None:
    """Let a fresh run begin only where no other one's checkpoints lie; the first process looks.

    Raises:
        ConfigError: There are some.
        CheckpointError: Whether there are, nobody knows.
    """
    newest = NONE
    if peers.rank == 0:
        try:
            known = steps_kept(storage)
            newest = step_of(known[-1]) or 0 if known else NONE
        except StateError:
            newest = UNKNOWN
    (latest,) = peers.broadcast_floats([newest])
    if latest == UNKNOWN:
        raise CheckpointError(
            "the storage cannot be listed: whether it holds the checkpoints of another run, nobody knows"
        )
    if latest != NONE:
        raise ConfigError(
            f"the storage holds {name_of(int(latest))} of another run; call resume() to go on "
            "from it, or give another folder"
        )
