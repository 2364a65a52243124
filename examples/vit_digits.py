"""A ViT-like network on handwritten digits, grown: python examples/vit_digits.py."""

import sys

import torch
import torch.nn.functional as F
from arms import Batch, Parts, Task, main
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformer import Block

EPOCHS, BATCH = 40, 64
DIM, HEAD, BLOCKS, PATCH = 16, 2, 2, 2


class Vit(nn.Module):
    def __init__(self, heads: int = 1, hidden: int = 1) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, DIM)
        self.places = nn.Embedding((8 // PATCH) ** 2, DIM)
        self.blocks = nn.Sequential(*(Block(DIM, HEAD, heads, hidden, causal=False) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 8, 8) -> (batch, 10)
        x = x.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3).flatten(1, 2)  # (batch, patches, 4)
        x = self.patches(x) + self.places.weight
        return self.head(self.norm(self.blocks(x)).mean(1))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def data(seed: int) -> Parts:
    """Shuffle by the seed; cut into 900 images to train, 360 probe, 200 validation, 337 test."""
    order = torch.Generator().manual_seed(seed)
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    train, probe, val, test = torch.randperm(len(images), generator=order).split([900, 360, 200, 337])
    rows = [r for _ in range(EPOCHS) for r in train[torch.randperm(900, generator=order)].split(BATCH)]
    cut = [(images[r], labels[r]) for r in (*rows, probe, val, test)]
    return Parts(cut[:-3], [cut[-3]], cut[-2], cut[-1])


TASK = Task(
    build=Vit,
    data=data,
    loss_fn=loss_fn,
    rates=(3e-3, 1e-2, 3e-2),
    budget={"growth_factor": 4.0, "growth_events": 2},
    # 360 images are few to be sure by: a false-keep budget of 0.2 instead of 0.05.
    config={
        "growth": "incubate",
        "schedule": {"warmup": 0.06, "stop": 0.5},
        "race": {"steps": 60},
        "gate": {"false_keep": 0.2},
    },
    classes=True,
)

if __name__ == "__main__":
    sys.exit(main(TASK, seeds=1))
