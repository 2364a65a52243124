"""FSDP2, where every process keeps a part of each parameter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn

from esper.distributed.fsdp.gathered import gathered
from esper.distributed.fsdp.reshard import unshard
from esper.distributed.group import Group
from esper.distributed.model_wrapper import Optimizers, Wrapping
from esper.distributed.watchdog import Watchdog

__all__ = ["Sharded"]


class Sharded(Wrapping):
    """FSDP2: every process has a shard of each parameter.

    Args:
        host: Module that ``fully_shard`` was called with last.
        deadline: Seconds to wait for another process.
    """

    deferred = True
    sharded = True

    def __init__(self, host: nn.Module, deadline: float) -> None:
        super().__init__(host, Group(None, deadline), Watchdog(None, deadline))

    def gathered(self) -> AbstractContextManager[None]:
        """Gather the shards for a while."""
        return gathered(self.host)

    def plain(self, optimizers: Optimizers) -> AbstractContextManager[None]:
        """Make the model a plain one, with its optimizers, and shard it again."""
        return self.reshaping(optimizers)

    @contextmanager
    def reshaping(self, optimizers: Optimizers) -> Iterator[None]:
        """Make the model a plain one, with its optimizers, and shard it again."""
        resharding = unshard(self.host, optimizers)
        try:
            yield
        finally:
            resharding.again()  # along another axis where the old one no longer fits: values are the same
