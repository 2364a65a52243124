"""Four small residual hosts on real data, each with pairs to widen and blocks for blueprints to live at."""

from __future__ import annotations

import functools
import re
from functools import partial
from pydoc_data.topics import topics

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import data
from benchmarks.data import Split, stream
from benchmarks.tasks import Task, Widths, accuracy

CONTEXT = 16  # characters seen before the one to be told
CUTS = (900, 1350)  # of 1797 digits: where training ends, where the probe ends
COPIES = (8, 1, 4)  # of each training, probe and test picture
LETTERS = "\n !\"#'()*,-./0123456789:;<=>@[]_abcdefghijklmnopqrstuvwxyz"  # 98 % of the text; "@": all others
PARTS = {"train": (0.0, 0.7, 32768), "probe": (0.7, 0.85, 4096), "test": (0.85, 1.0, 4096)}


class Residual(nn.Module):
    """x plus a pair of layers behind a norm; the pair is what widening makes wider."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(self.norm(x)).relu())


class ResidualImage(nn.Module):
    """The same of two 3x3 convolutions; no norm, as in the digits CNN."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


class Attention(nn.Module):
    """x plus one head of self-attention behind a norm."""

    def __init__(self, width: int, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norm = nn.LayerNorm(width)
        self.read, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.read(self.norm(x)).chunk(3, dim=-1)  # (batch, steps, width)
        scores = query @ key.mT / query.shape[-1] ** 0.5
        if self.causal:
            future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        return x + self.out(scores.softmax(-1) @ value)


class Characters(nn.Module):
    """Letters and their places as vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(len(LETTERS), width), nn.Parameter(torch.empty(CONTEXT, width))
        nn.init.normal_(self.place, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.letter(x) + self.place  # (batch, CONTEXT, width)


class Patches(nn.Module):
    """An 8x8 picture as 16 patches of 2x2, and their places, as vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.place = nn.Linear(4, width), nn.Parameter(torch.empty(16, width))
        nn.init.normal_(self.place, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 2, stride=2).mT  # (batch, 16, 4)
        return self.read(patches) + self.place


class Mean(nn.Module):
    """The mean of all steps, behind a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).mean(1)


class Last(nn.Module):
    """The last step, behind a norm: what is told there could not be read off the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[:, -1])


def shifted(seed: int, images: bool = False) -> Split:
    """Shift every digit by up to a pixel either way, at random: training and test pictures several times.

    As they are, a host of 8 units learns them by heart and no size helps; so shifted it underfits. The gate
    wants independent examples, so the probe has every picture once.
    """
    bunch = load_digits()
    random = np.random.default_rng(stream(seed, "split"))
    order = random.permutation(len(bunch.target))
    pieces = []
    for own, copies in zip(np.split(order, CUTS), COPIES, strict=True):
        x, y = data.tensor(bunch.data[own] / 16.0).reshape(-1, 1, 8, 8), torch.as_tensor(bunch.target[own])
        x, y = x.repeat(copies, 1, 1, 1), y.repeat(copies)
        moves = torch.from_numpy(random.integers(0, 3, (2, len(x), 1)))  # down and right
        grid = torch.arange(8)
        down, right = (moves[0] + grid)[:, :, None], (moves[1] + grid)[:, None, :]
        x = F.pad(x, (1, 1, 1, 1))[:, 0][torch.arange(len(x))[:, None, None], down, right]
        pieces.append((x[:, None] if images else x.flatten(1), y))
    return Split(*pieces)


def vector_host(widths: Widths) -> nn.Sequential:
    """Build 64 → 8, a residual pair, → 10."""
    (hidden,) = widths
    return nn.Sequential(nn.Linear(64, 8), nn.ReLU(), Residual(8, hidden), nn.LayerNorm(8), nn.Linear(8, 10))


def image_host(widths: Widths) -> nn.Sequential:
    """Build 1 → 4 channels, a residual pair at 4x4, → 10."""
    (hidden,) = widths
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(
        *first, ResidualImage(4, hidden), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10)
    )


def sequence_host(widths: Widths) -> nn.Sequential:
    """Build one layer of a transformer over characters, 16 wide; the last step tells the next."""
    (hidden,) = widths
    return nn.Sequential(
        Characters(16), Attention(16), Residual(16, hidden), Last(16), nn.Linear(16, len(LETTERS))
    )


def patch_host(widths: Widths) -> nn.Sequential:
    """Build one layer of a transformer over patches, 8 wide, where every patch sees every other."""
    (hidden,) = widths
    return nn.Sequential(
        Patches(8), Attention(8, causal=False), Residual(8, hidden), Mean(8), nn.Linear(8, 10)
    )


@functools.cache
def text() -> Tensor:
    """Return Python's own manual as numbers of letters, lower case, runs of one sign shortened to three."""
    joined = "\n".join(topics[name] for name in sorted(topics)).lower()
    joined = re.sub(r"(\s)\s+", r"\1", re.sub(r"([^a-z])\1{3,}", r"\1\1\1", joined))
    other = LETTERS.index("@")
    return torch.tensor([LETTERS.find(letter) if letter in LETTERS else other for letter in joined])


def characters(seed: int) -> Split:
    """Draw windows: each part from a stretch of the text of its own, the stretches alike for all seeds."""
    random = np.random.default_rng(stream(seed, "split"))
    letters = text()
    pieces = []
    for low, high, count in PARTS.values():
        starts = random.integers(int(low * len(letters)), int(high * len(letters)) - CONTEXT - 1, count)
        windows = letters[torch.from_numpy(starts)[:, None] + torch.arange(CONTEXT + 1)]
        pieces.append((windows[:, :-1].contiguous(), windows[:, -1].contiguous()))
    return Split(*pieces)


recipe = partial(
    Task,
    loss=F.cross_entropy,
    score=accuracy,
    higher_is_better=True,
    optimizer=torch.optim.Adam,
    rates=(3e-3, 1e-2, 3e-2),
    batch=128,
)

TASKS = {
    task.name: task
    for task in (
        recipe("vector", shifted, vector_host, (2,), (20,), epochs=14),
        recipe("image", partial(shifted, images=True), image_host, (2,), (8,), epochs=14),
        recipe("patches", partial(shifted, images=True), patch_host, (2,), (20,), epochs=14),
        recipe("sequence", characters, sequence_host, (4,), (36,), epochs=3),
    )
}
BLOCKS = {"vector": "2", "image": "3", "patches": "2", "sequence": "2"}  # the residual block that grows
