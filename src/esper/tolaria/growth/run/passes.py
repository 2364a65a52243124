"""Passes of one run through its host: to the loss of a batch, and over the first held-out one."""

from __future__ import annotations

import time

from torch import Tensor, nn

from esper.batches.examples import LossFunction
from esper.surgery.isolation.contexts import examining

TIMED = 5  # passes of which the median counts


class Passes:
    """Runs a host.

    Args:
        host: The model that grows.
        loss_fn: The user's.
        batch: The first held-out batch.
    """

    def __init__(self, host: nn.Module, loss_fn: LossFunction, batch: object) -> None:
        self.host, self.loss_fn, self.batch = host, loss_fn, batch

    def loss_of(self, batch: object) -> Tensor:
        """Return the scalar loss of a batch, through the host as it is."""
        return self.loss_fn(self.host, batch)

    def over_probe(self) -> Tensor:
        """Return the loss of the first held-out batch."""
        return self.loss_of(self.batch)

    def latency_ms(self) -> float:
        """Return the median of five passes over the first held-out batch, in milliseconds."""
        times = []
        with examining(self.host):
            for _ in range(TIMED):
                begun = time.perf_counter()
                self.over_probe()
                times.append((time.perf_counter() - begun) * 1e3)
        return sorted(times)[TIMED // 2]
