"""Growing keeps nothing alive that it no longer needs: not until the next garbage collection, either."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper

STEPS = 100


class Block(nn.Module):
    """Adds to a stream what a narrow layer makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Draw what a fixed net says, (64, 8) both."""
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 8, generator=fixed) for _ in range(2))
    x = torch.randn(64, 8, generator=generator)
    return x, (x @ first).sin() @ second


def squared(model: nn.Module, given: Any) -> Tensor:
    return F.mse_loss(model(given[0]), given[1])


class Run:
    """A host that is too narrow, and its loop."""

    def __init__(self, dear: float = math.inf, steps: int = STEPS) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(Block(), Block(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.01)
        probe = [batch(1000 + i) for i in range(4)]
        self.growth = esper.grow(self.net, self.optimizer, squared, probe=probe, steps=steps)
        assert self.growth.loop.early is not None
        self.early = self.growth.loop.early
        self.early.evidence.dear = dear

    def step(self, index: int) -> None:
        given = batch(index)
        loss = squared(self.net, given)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.growth.step(given, loss)


@pytest.mark.parametrize("dear", [0.0, math.inf])
def test_no_tensor_waits_for_the_garbage_collector(dear: float) -> None:
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)  # whatever a cycle holds comes to light
    try:
        run = Run(dear)
        for index in range(STEPS):
            run.step(index)
        run.growth.finish()
        gc.collect()
        left = [tuple(one.shape) for one in gc.garbage if isinstance(one, Tensor)]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert run.growth.plans
    assert left == []
