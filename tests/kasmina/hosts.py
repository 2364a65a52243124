"""The three hosts of the exactness tests, what they are trained with, and a look at everything they hold."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.contracts import Event

Batch = tuple[Tensor, Tensor]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(10, 3), nn.Linear(3, 3), nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.tanh(self.fc2(torch.relu(self.fc1(x)))))


class Block(nn.Module):
    """The inside of a residual block is a pair; its outside is not, because it meets the skip."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(channels, 3, 3, padding=1, bias=False),
            nn.BatchNorm2d(3),
        )
        self.conv2, self.bn2 = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(self.dropout(torch.relu(self.bn1(self.conv1(x)))))))


class Residual(nn.Module):
    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(1, 4, 3, padding=1), Block(4, dropout)
        self.last, self.head = nn.Conv2d(4, 5, 3), nn.Linear(5, 10)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(torch.relu(self.last(self.block(torch.relu(self.stem(x))))), 1)
        return self.head(self.dropout(x.flatten(1)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.act = nn.Linear(width, 6), nn.Linear(6, width), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.proj(weights @ v)
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.blocks = nn.ModuleList(Attention(8) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


HOSTS = {"mlp": Mlp, "residual": Residual, "transformer": Transformer}


def batch(kind: str, examples: int = 16, dtype: torch.dtype = torch.float32) -> Batch:
    label = torch.randint(10, (examples,))
    if kind == "mlp":
        return 2 * torch.eye(10, dtype=dtype)[label] + 0.3 * torch.randn(examples, 10, dtype=dtype), label
    if kind == "residual":
        return torch.randn(examples, 1, 6, 6, dtype=dtype), label
    return torch.randint(12, (examples, 5)), label


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def holdings(model: nn.Module) -> dict[str, Any]:
    """Type, ``__dict__`` keys in order and hook tables of every module."""
    return {
        path: (
            type(module),
            tuple(module.__dict__),
            tuple((k, len(v)) for k, v in module.__dict__.items() if k.endswith("_hooks") and v is not None),
        )
        for path, module in model.named_modules()
    }


def same(one: Any, other: Any) -> bool:
    """Compare nests of containers bit for bit, keys and their order included."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def frozen(state: Any) -> Any:
    """Copy the tensors of a nest."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {k: frozen(v) for k, v in state.items()}
    return [frozen(v) for v in state] if isinstance(state, (list, tuple)) else state


class Loop:
    """A training loop that can be stopped anywhere; data come from one stream, growth has its own."""

    def __init__(self, kind: str, grow: bool = True, net: nn.Module | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.kind = kind
        self.net = HOSTS[kind]() if net is None else net
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.01)
        self.probe = [batch(kind, 128)]
        self.events: list[Event] = []
        self.data = torch.Generator().manual_seed(1)
        given = {"steps": 200, "growth": "incubate", "config": {"schedule": {"warmup": 0.01}}, **options}
        torch.manual_seed(2)
        self.growth = (
            esper.grow(
                self.net, self.optimizer, loss_fn, probe=self.probe, on_event=self.events.append, **given
            )
            if grow
            else None
        )

    def step(self, times: int = 1) -> Loop:
        for _ in range(times):
            given = batch(self.kind, 32)
            loss = loss_fn(self.net, given)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.growth is not None:
                self.growth.step(given, loss)
        return self

    def until(self, stage: str, most: int = 400) -> Loop:
        """Train until a seed has just entered a stage."""
        for _ in range(most):
            self.step()
            told = [e for e in self.events if e.kind == "stage"]
            if told and told[-1].data["target"] == stage:
                return self
        raise AssertionError(f"no seed reached {stage} in {most} steps")

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]
