"""What stands around a model that many processes train, and how it lets the model change its shape.

A kernel that has passed stays a branch, averaged by growth itself, until the layers may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from esper.distributed.collectives import ALONE, Peers
from esper.distributed.watchdog import Watchdog
from esper.errors import SiteError
from esper.registry import Registry

WRAPPINGS = Registry("esper.distributed.wrappings", "esper.wrappings")
Optimizers = Mapping[str, Optimizer]


class Wrapping:
    """Nothing around the model: one process trains it; what others are, ``wrappings/`` says.

    Whatever returns a context is entered by all processes together.

    Args:
        host: Model that grows.
        peers: Processes that train it.
        watchdog: Watchdog over them; None: nobody is to be missed.

    Attributes:
        peers: Processes that train it.
        deferred: Whether layers keep their shapes until ``reshaping``.
        sharded: Whether a process holds only a part of each parameter.
    """

    deferred = False
    sharded = False

    def __init__(self, host: nn.Module, peers: Peers = ALONE, watchdog: Watchdog | None = None) -> None:
        self.host, self.peers, self.watchdog = host, peers, watchdog

    def close(self) -> None:
        """Let go of the other processes; growth is over."""
        if self.watchdog is not None:
            self.watchdog.close()

    def gathered(self) -> AbstractContextManager[None]:
        """Let the host run as an ordinary module of this process."""
        return nullcontext()

    def plain(self, optimizers: Optimizers) -> AbstractContextManager[None]:
        """Let host and optimizers hold whole tensors."""
        return nullcontext()

    def reshaping(self, optimizers: Optimizers) -> AbstractContextManager[None]:
        """Let the host change its shape."""
        return nullcontext()


def wrapping_of(model: nn.Module, mode: str, deadline: float) -> Wrapping:
    """Find out who trains a model.

    Args:
        model: Module that the user's loop calls.
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
    return Wrapping(model)
