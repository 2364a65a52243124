"""FSDP2, where every process keeps a part of each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from esper.checkpoint.contents.sharded import laid_out, lifted, likes_of, lowered, refuse_unfit, targets_for
from esper.checkpoint.format.reader import sound_among, steps_kept
from esper.checkpoint.format.shard_files import (
    TYPES,
    orphans,
    read_shards,
    together,
    verify_shards,
    write_shards,
)
from esper.distributed.collectives import ALONE
from esper.distributed.fsdp.gathered import whole
from esper.distributed.fsdp.reshard import unshard
from esper.distributed.group import Group
from esper.distributed.model_wrapper import TABLE, Optimizers, State, Wrapping
from esper.distributed.watchdog import Watchdog
from esper.errors import StateError

__all__ = ["Sharded"]

MODEL = "modules//"  # where the model's own tensors stand in a state


class Sharded(Wrapping):
    """FSDP2: every process has a shard of each parameter.

    Args:
        host: What ``fully_shard`` was called with, last.
        deadline: Seconds to wait for another process.
    """

    deferred = True
    sharded = True

    def __init__(self, host: nn.Module, deadline: float) -> None:
        super().__init__(host, Group(None, deadline), Watchdog(None, deadline))

    def whole(self) -> AbstractContextManager[Any]:
        """Gather the shards for a while."""
        return whole(self.host)

    def plain(self, optimizers: Optimizers) -> AbstractContextManager[Any]:
        """Make the model a plain one, with its optimizers, and shard it again."""
        return self.opened(optimizers)

    @contextmanager
    def opened(self, optimizers: Optimizers) -> Iterator[None]:
        """Make the model a plain one, with its optimizers, and shard it again."""
        resharding = unshard(self.host, optimizers)
        try:
            yield
        finally:
            resharding.again()  # along another axis where the old one no longer fits: values are the same

    def stow(self, storage: Any, name: str, state: State) -> tuple[State, list[dict[str, Any]]]:
        """Write each process's shards, after those that no checkpoint lists are gone."""
        if self.peers.rank == 0:
            with suppress(StateError):  # a storage that does not answer says so when it is written to
                kept = sound_among(storage, steps_kept(storage)).values()
                for orphan in orphans(storage, kept):
                    storage.delete(orphan)
        left, pieces = lifted(state)
        table = write_shards(storage, name, pieces, self.peers)
        listed = [{"name": shard, **facts} for shard, facts in table["shards"].items()]
        return {**left, TABLE: table}, listed

    def verify(self, storage: Any, manifest: Any) -> None:
        """Check the shards a checkpoint lists."""
        verify_shards(storage, manifest, self.peers)

    def bring(self, storage: Any, state: State, optimizers: Optimizers) -> State:
        """Read this process's shards, however many processes wrote them; what was saved whole is spread."""
        likes = likes_of(self.host, optimizers)
        if TABLE not in state:
            return laid_out(state, likes)
        table = state[TABLE]
        together(self.peers, lambda: refuse_unfit(state, self.host))
        targets = together(self.peers, lambda: targets_for(table, likes))
        read_shards(storage, table, targets, self.peers)
        return laid_out(lowered(state, targets), likes)

    @staticmethod
    def gathered(storage: Any, state: State) -> dict[str, Tensor]:
        """Return the model's tensors of a sharded checkpoint, whole, in one process.

        Raises:
            CheckpointError: A shard is missing or damaged.
        """
        model, table = state["modules"][""]["state"], state[TABLE]
        paths = {path: facts for path, facts in table["tensors"].items() if path.startswith(MODEL)}
        targets = {
            path: torch.empty(facts["shape"], dtype=TYPES[facts["dtype"]]) for path, facts in paths.items()
        }
        read_shards(storage, {**table, "tensors": paths}, targets, ALONE)
        return lowered(model, targets)
