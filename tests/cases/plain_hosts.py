"""Small hosts of every kind that grows, and their tasks; they are read where Esper is not, so without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 6


class Gated(nn.Module):
    """A GLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(10, 1), nn.Linear(10, 1), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Heads(nn.Module):
    """One narrow head that has to look back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS)
        self.q, self.k, self.v, self.out = nn.Linear(8, 2), nn.Linear(8, 2), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = (one(x).unflatten(-1, (-1, 2)).transpose(1, 2) for one in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.out(y.transpose(1, 2).flatten(2)))[:, -1]


class Recurrent(nn.Module):
    """A state of one unit."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, TOKENS), nn.Linear(1, TOKENS)
        self.rnn = kind(TOKENS, 1, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


class Fork(nn.Module):
    """Two layers read one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(10, 1), nn.Linear(1, 10), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.trunk(x))
        return torch.relu(self.one(h)) + self.two(h)


class Residual(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Residual(), Residual()]), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def linear() -> nn.Module:
    """Two layers of a net that is far too narrow."""
    return nn.Sequential(nn.Linear(10, 1), nn.Tanh(), nn.Linear(1, 10))


def convolution() -> nn.Module:
    """Two convolutions with a norm between."""
    return nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU(), nn.Conv2d(1, 10, 3, padding=1),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(),
    )  # fmt: skip


def stacked() -> nn.Module:
    """Blocks between other children of a Sequential."""
    return nn.Sequential(nn.Linear(4, 4), Residual(), Residual(), nn.LayerNorm(4), nn.Linear(4, 10))


def alone() -> nn.Module:
    """A layer that nothing can be added to but a branch."""
    return nn.Sequential(nn.Linear(4, 10))


def corners(n: int) -> tuple[Tensor, Tensor]:
    """Ten classes around ten corners."""
    y = torch.randint(10, (n,))
    return 2 * torch.eye(10)[y] + 0.3 * torch.randn(n, 10), y


def spots(n: int) -> tuple[Tensor, Tensor]:
    """Ten patterns of 3 × 3 points, each somewhere."""
    y = torch.randint(10, (n,))
    patterns = torch.randn(10, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    return F.pad(patterns[y], (2, 1, 1, 2)) + 0.1 * torch.randn(n, 1, 6, 6), y


def first(n: int) -> tuple[Tensor, Tensor]:
    """Name the first token at the end."""
    ids = torch.randint(TOKENS, (n, 3))
    return ids, ids[:, 0]


def exclusive(n: int) -> tuple[Tensor, Tensor]:
    """Two exclusive-ors."""
    x = torch.randn(n, 4)
    return x, (x[:, 0] * x[:, 1] > 0) + 2 * (x[:, 2] * x[:, 3] > 0)


@dataclass(frozen=True)
class Kind:
    """A host, its task and where it is to grow."""

    build: Callable[[], nn.Module]
    draw: Callable[[int], tuple[Tensor, Tensor]]
    site: str
    recipe: str = "early"
    blueprint: str = "widen"


KINDS = {
    "linear": Kind(linear, corners, "0>2"),
    "linear, incubated": Kind(linear, corners, "0>2", "incubate"),
    "convolution": Kind(convolution, spots, "0>3"),
    "gated": Kind(Gated, corners, "gate*up>down"),
    "heads": Kind(Heads, first, "q>out"),
    "GRU": Kind(lambda: Recurrent(nn.GRU), first, "rnn>head"),
    "LSTM": Kind(lambda: Recurrent(nn.LSTM), first, "rnn>head"),
    "fork": Kind(Fork, corners, "trunk>one+two"),
    "block in a list": Kind(Blocks, exclusive, "blocks+block", blueprint="deepen"),
    "block in a Sequential": Kind(stacked, exclusive, "1+block", blueprint="deepen"),
    "branch": Kind(alone, exclusive, "0+residual_mlp", "incubate", "residual_mlp"),
}
