"""Hosts in which nothing can be widened; without Esper, so that a saved one is rebuilt where it is not."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Residual(nn.Module):
    """LayerNorm and a lone layer: nothing here can be widened."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class Sequences(nn.Module):
    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.embed, self.recompute = nn.Embedding(11, 8), recompute
        self.blocks = nn.ModuleList(Residual(8) for _ in range(2))
        self.head = nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 11))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 11)
    )


HOSTS = {"vectors": vectors, "images": images, "sequences": Sequences}
INPUTS = {
    "vectors": lambda n: torch.randn(n, 8),
    "images": lambda n: torch.randn(n, 2, 6, 6),
    "sequences": lambda n: torch.randint(0, 11, (n, 5)),
}
