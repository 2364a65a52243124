"""Pre-norm transformers in modules: a character GPT on Python's manual and a ViT on handwritten digits.

A size is one pair per block: width of the attention (heads of a fixed size side by side) and of the MLP.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import pairwise
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import data
from benchmarks.data import Split
from benchmarks.suite_tasks.task import Batch, Size, SuiteTask, token_loss

TIME, DIM, HEAD = 64, 32, 8  # of the GPT: with 64 channels four layers take 24 ms a step and lose to one
PATCH, PATCH_DIM, PATCH_HEAD = 2, 32, 8  # of the ViT
CUTS = (0, 0.72, 0.85, 1)  # of the text, by position: training, probe, test
HELD_OUT = 384  # windows of the probe and of the test part


class Attention(nn.Module):
    """Multi-head self-attention whose number of heads follows from its width."""

    def __init__(self, dim: int, width: int, head: int, causal: bool) -> None:
        super().__init__()
        self.head, self.causal = head, causal
        self.q, self.k, self.v = (nn.Linear(dim, width) for _ in range(3))
        self.o = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, dim) -> the same
        q, k, v = (f(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # (batch, heads, time, head)
        return self.o(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP, each normalised before and added; born as the identity."""

    def __init__(self, dim: int, attention: int, hidden: int, head: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, attention, head, causal)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        for last in (self.attention.o, self.mlp[2]):  # fixed networks too: they train better for it
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt(nn.Module):
    """Predicts the next character at every place."""

    def __init__(self, characters: int, size: Size) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, DIM), nn.Embedding(TIME, DIM)
        nn.init.normal_(self.characters.weight, std=0.1)
        nn.init.normal_(self.places.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(DIM, a, m, HEAD, causal=True) for a, m in size)
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, characters)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time) -> (batch, time, characters)
        x = self.characters(x) + self.places(torch.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Vit(nn.Module):
    """Classifies an 8x8 image from its 16 patches."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, PATCH_DIM)
        self.places = nn.Embedding((8 // PATCH) ** 2, PATCH_DIM)
        self.blocks = nn.ModuleList(Block(PATCH_DIM, a, m, PATCH_HEAD, causal=False) for a, m in size)
        self.norm, self.head = nn.LayerNorm(PATCH_DIM), nn.Linear(PATCH_DIM, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 1, 8, 8) -> (batch, 10)
        x = x[:, 0].unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)
        x = self.patches(x) + self.places.weight  # (batch, patches, dim)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def block_sizes(net: nn.Module) -> Size:
    """Read every block's widths back, in order."""
    return tuple(
        (block.attention.o.in_features, block.mlp[2].in_features)
        for block in net.get_submodule("blocks").children()
        if isinstance(block, Block)
    )


@cache
def text() -> tuple[Tensor, int]:
    """Return the manual as numbers; paragraphs that several topics share come once, so no part repeats."""
    paragraphs = (" ".join(p.split()) for topic in topics.values() for p in topic.split("\n\n"))
    joined = "\n".join(dict.fromkeys(paragraphs))
    alphabet = {character: number for number, character in enumerate(sorted(set(joined)))}
    return torch.tensor([alphabet[character] for character in joined]), len(alphabet)


@cache
def windows(seed: int) -> Split:
    """Cut the text by position, and each part into windows that start at a place of the seed's choice."""
    characters, _ = text()
    cuts = [int(share * len(characters)) for share in CUTS]
    train, probe, test = (characters[a:b] for a, b in pairwise(cuts))
    draw = torch.Generator().manual_seed(data.stream(seed, "split"))
    offset = int(torch.randint(TIME, (), generator=draw))
    chosen = [cut(train, torch.arange(offset, len(train) - TIME, TIME))]
    for part in (probe, test):
        starts = torch.arange(offset, len(part) - TIME, TIME)
        rows = torch.randperm(len(starts), generator=draw)[:HELD_OUT]
        chosen.append(cut(part, starts[rows]))
    return Split(*chosen)


def cut(part: Tensor, starts: Tensor) -> Batch:
    window = part[starts[:, None] + torch.arange(TIME + 1)]
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def gpt(size: Size) -> Gpt:
    return Gpt(text()[1], size)


@cache
def images(seed: int) -> Split:
    return data.digits(seed, images=True)


TASKS = (
    SuiteTask(
        name="gpt",
        selection=True,
        split=windows,
        network=gpt,
        read=block_sizes,
        sizes=tuple(((32, 128),) * depth for depth in (1, 2, 4)),
        loss=token_loss,
        metric="loss",
        optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.01),
        rates=(3e-3, 6e-3, 1.2e-2),
        steps=900,
        batch=12,
        schedules=("onecycle", "constant"),
        seeds=5,
    ),
    SuiteTask(
        name="vit",
        selection=False,
        split=images,
        network=Vit,
        read=block_sizes,
        sizes=(((32, 16),), ((32, 32),) * 2, ((32, 64),) * 4),
        loss=F.cross_entropy,
        metric="accuracy",
        optimizer=partial(torch.optim.AdamW, weight_decay=0.01),
        rates=(1e-3, 3e-3, 1e-2),
        steps=30 * 17,
        batch=64,
        schedules=("cosine", "onecycle"),
        seeds=5,
    ),
)
