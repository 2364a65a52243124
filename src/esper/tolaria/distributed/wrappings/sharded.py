"""FSDP2, where every process keeps a part of each parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esper.kasmina.peers import Peers
from esper.tolaria.distributed.group import Group
from esper.tolaria.distributed.sharding import unshard
from esper.tolaria.distributed.whole import whole

__all__ = ["Sharded"]


class Sharded:
    """FSDP2: every process has a shard of each parameter.

    Args:
        host: What ``fully_shard`` was called with, last.
        deadline: Seconds to wait for another process.
    """

    deferred = True

    def __init__(self, host: nn.Module, deadline: float) -> None:
        self.host = host
        self.peers: Peers = Group(None, deadline)

    def whole(self) -> AbstractContextManager[Any]:
        """Gather the shards for a while."""
        return whole(self.host)

    @contextmanager
    def opened(self, optimizers: Mapping[str, Optimizer]) -> Iterator[None]:
        """Make the model a plain one, with its optimizers, and shard it again."""
        with ExitStack() as back:
            back.callback(unshard(self.host, optimizers).again)
            yield
