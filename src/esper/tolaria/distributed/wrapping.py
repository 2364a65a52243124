"""What stands around a model that many processes train, and how it lets the model change its shape.

A kernel that has passed stays a branch, averaged by growth itself, until the layers may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from esper.errors import SiteError
from esper.kasmina.peers import Peers
from esper.registry import Registry

WRAPPINGS = Registry("esper.tolaria.distributed.wrappings", "esper.wrappings")


class Wrapping(Protocol):
    """What the user wrapped the host in; made from that and the seconds to wait for another process.

    Attributes:
        host: The model inside.
        peers: The processes that train it.
        governed: Whether a governor can watch it: gradients are whole and the same in every process.
        deferred: Whether layers keep their shapes until ``opened``.
    """

    host: nn.Module
    peers: Peers
    governed: bool
    deferred: bool

    def close(self) -> None:
        """Let go of the other processes; growth is over."""

    def whole(self) -> AbstractContextManager[Any]:
        """Let the host run as an ordinary module of this process; entered by all processes together."""

    def plain(self, optimizers: Mapping[str, Optimizer]) -> AbstractContextManager[Any]:
        """Let host and optimizers hold whole tensors; entered by all processes together."""

    def opened(self, optimizers: Mapping[str, Optimizer]) -> AbstractContextManager[Any]:
        """Let the host change its shape; entered by all processes together."""


def wrapping_of(model: nn.Module, mode: str, deadline: float) -> Wrapping:
    """Find out who trains a model.

    Args:
        model: What the user calls.
        mode: "alone", or "auto": together with others where torch.distributed says so.
        deadline: Seconds to wait for another process.

    Raises:
        SiteError: There are several processes, and nothing averages the model's gradients.
    """
    if isinstance(model, DistributedDataParallel):
        return WRAPPINGS.get("replicated")(model, deadline)
    if any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__):
        return WRAPPINGS.get("sharded")(model, deadline)
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if together and mode != "alone":
        raise SiteError(
            f"{dist.get_world_size()} processes run, and the model is neither wrapped in "
            "DistributedDataParallel nor sharded by fully_shard: give esper.grow what the loop calls; for a "
            "model of its own in each process set distributed.mode to 'alone'"
        )
    return WRAPPINGS.get("bare")(model, deadline)
