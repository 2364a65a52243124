"""FSDP2, where every process keeps a part of each parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esper.kasmina.peers import Peers
from esper.tolaria.distributed.fsdp import is_sharded
from esper.tolaria.distributed.group import Group
from esper.tolaria.distributed.sharding import unshard
from esper.tolaria.distributed.watchdog import Watchdog
from esper.tolaria.distributed.whole import whole

__all__ = ["Sharded"]


class Sharded:
    """FSDP2: every process has a shard of each parameter.

    Args:
        host: What ``fully_shard`` was called with, last.
        deadline: Seconds to wait for another process.
    """

    governed = False
    deferred = True

    def __init__(self, host: nn.Module, deadline: float) -> None:
        self.host = host
        self.peers: Peers = Group(None, deadline)
        self.watchdog = Watchdog(None, deadline)
        self.notes: list[str] = []  # what is sharded otherwise than before

    def close(self) -> None:
        """End the watchdog."""
        self.watchdog.close()

    def whole(self) -> AbstractContextManager[Any]:
        """Gather the shards for a while."""
        return whole(self.host)

    def plain(self, optimizers: Mapping[str, Optimizer]) -> AbstractContextManager[Any]:
        """Make the model a plain one, with its optimizers, and shard it again."""
        return self.opened(optimizers)

    @contextmanager
    def opened(self, optimizers: Mapping[str, Optimizer]) -> Iterator[None]:
        """Make the model a plain one, with its optimizers, and shard it again."""
        if not is_sharded(self.host):  # opened already
            yield
            return
        resharding = unshard(self.host, optimizers)
        try:
            yield
        finally:
            self.notes += resharding.again()
