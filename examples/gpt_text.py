"""A GPT-like network on real text, grown: python examples/gpt_text.py.

Predicts the next character of Python's own documentation, which every Python brings along.
"""

import sys
from itertools import pairwise
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from arms import Batch, Parts, Task, main
from torch import Tensor, nn
from transformer import Block

TIME, BATCH, STEPS = 32, 32, 600
DIM, HEAD, BLOCKS = 32, 8, 2


class Gpt(nn.Module):
    def __init__(self, characters: int, heads: int = 1, hidden: int = 4) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, DIM), nn.Embedding(TIME, DIM)
        self.blocks = nn.Sequential(*(Block(DIM, HEAD, heads, hidden, causal=True) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, characters)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time) -> (batch, time, characters)
        x = self.characters(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def read() -> tuple[Tensor, int]:
    """Return the text as numbers; paragraphs that several topics share come once, so that no part repeats."""
    paragraphs = (" ".join(p.split()) for text in topics.values() for p in text.split("\n\n"))
    text = "\n".join(dict.fromkeys(paragraphs))
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    return torch.tensor([alphabet[character] for character in text]), len(alphabet)


TEXT, CHARACTERS = read()


def data(seed: int) -> Parts:
    """Cut the text by position: 80 % to train, then 5 % probe, 5 % validation, 10 % test."""
    cuts = [int(share * len(TEXT)) for share in (0, 0.8, 0.85, 0.9, 1)]
    text, probe, val, test = (TEXT[a:b] for a, b in pairwise(cuts))
    order = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - TIME, (STEPS, BATCH), generator=order)
    train = [windows(text, row) for row in starts]
    every = [windows(part, torch.arange(0, len(part) - TIME, TIME)) for part in (probe, val, test)]
    return Parts(train, list(zip(*(part.split(256) for part in every[0]), strict=True)), every[1], every[2])


def windows(text: Tensor, starts: Tensor) -> Batch:
    cut = text[starts[:, None] + torch.arange(TIME + 1)]
    return cut[:, :-1], cut[:, 1:]


TASK = Task(
    build=lambda: Gpt(CHARACTERS),
    data=data,
    loss_fn=loss_fn,
    rates=(3e-3, 1e-2, 3e-2),
    budget={"growth_factor": 4.0, "growth_events": 2},
    config={
        "growth": "incubate",
        "schedule": {"warmup": 0.04, "stop": 0.5},
    },  # early, so that what is new has time to learn
    classes=False,
)

if __name__ == "__main__":
    sys.exit(main(TASK, seeds=1))
