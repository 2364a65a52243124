"""A model that one process trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.optim import Optimizer

from esper.kasmina.peers import ALONE

__all__ = ["Bare"]


class Bare:
    """Nothing: one process."""

    governed = True
    deferred = False

    def __init__(self, host: nn.Module, deadline: float) -> None:
        self.host, self.peers = host, ALONE

    def close(self) -> None:
        """Do nothing."""

    def whole(self) -> AbstractContextManager[Any]:
        """Do nothing."""
        return nullcontext()

    def plain(self, optimizers: Mapping[str, Optimizer]) -> AbstractContextManager[Any]:
        """Do nothing."""
        return nullcontext()

    def opened(self, optimizers: Mapping[str, Optimizer]) -> AbstractContextManager[Any]:
        """Do nothing."""
        return nullcontext()
