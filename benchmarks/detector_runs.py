"""Labelled training runs for the detectors' bench: healthy, or with a fault at a known step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as lrs

from benchmarks import data
from benchmarks.data import stream
from benchmarks.tasks import cnn, mlp

Batch = tuple[Tensor, Tensor]
FAULTS = ("NaN in the batch", "NaN in a gradient", "gradient ×1000", "label noise", "learning rate ×100")
# Slow ones, reported and not promised: by how much they grow in a step.
DRIFTS = {"rate creeps up": 0.02, "data drift": 0.01, "gradient noise grows": 0.02}


@dataclass(frozen=True)
class Scenario:
    """A task as an ordinary user trains it; ``rough`` are those whose batches hold a few examples."""

    split: Callable[[int], data.Split]
    net: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    optimizer: Callable[..., torch.optim.Optimizer]
    batch: int
    schedule: Callable[..., Any] | None = None
    grows: bool = False


class Rows(nn.Module):
    """Attention over the eight rows of a digit, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x.reshape(-1, 8, 8))).mean(1))


def heavy_tails(seed: int) -> data.Split:
    """Draw the teacher's task with Student-t noise of three degrees of freedom on the targets."""
    split = data.teacher(seed)
    generator = torch.Generator().manual_seed(stream(seed, "growth"))

    def noisy(part: Batch) -> Batch:
        x, y = part
        normal = torch.randn(4, *y.shape, generator=generator)
        return x, y + normal[0] / (normal[1:].square().sum(0) / 3).sqrt()

    return data.Split(noisy(split.train), noisy(split.probe), noisy(split.test))


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    rise = lrs.LinearLR(optimizer, 0.01, 1.0, steps // 10)
    return lrs.SequentialLR(
        optimizer, [rise, lrs.CosineAnnealingLR(optimizer, steps)], milestones=[steps // 10]
    )


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return lrs.OneCycleLR(optimizer, 1e-2, total_steps=steps + 1)


def stairs(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return lrs.StepLR(optimizer, max(steps // 4, 1), 0.5)


def restarts(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    return lrs.CosineAnnealingWarmRestarts(optimizer, max(steps // 5, 1), eta_min=1e-4)


images = partial(data.digits, images=True)
adam, adamw, sgd, rmsprop = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop
heavy_ball = partial(sgd, momentum=0.9)

SCENARIOS: dict[str, Scenario] = {
    "digits-mlp adam 64": Scenario(
        data.digits, lambda: mlp(64, 10, (32,)), F.cross_entropy, partial(adam, lr=5e-3), 64
    ),
    "digits-mlp momentum 16 restarts": Scenario(
        data.digits, lambda: mlp(64, 10, (32,)), F.cross_entropy, partial(heavy_ball, lr=0.03), 16, restarts
    ),
    "digits-cnn adamw 32 one-cycle": Scenario(
        images, lambda: cnn((8, 16)), F.cross_entropy, partial(adamw, lr=1e-3), 32, one_cycle
    ),
    "digits-cnn rmsprop 8 stairs": Scenario(
        images, lambda: cnn((8, 16)), F.cross_entropy, partial(rmsprop, lr=1e-3), 8, stairs
    ),
    "digits-attention adamw 32 warm-up": Scenario(
        data.digits, Rows, F.cross_entropy, partial(adamw, lr=3e-3), 32, warm_up
    ),
    "cancer-mlp adam 4": Scenario(
        data.breast_cancer, lambda: mlp(30, 2, (16,)), F.cross_entropy, partial(adam, lr=1e-3), 4
    ),
    "cancer-mlp sgd 2": Scenario(
        data.breast_cancer, lambda: mlp(30, 2, (16,)), F.cross_entropy, partial(sgd, lr=0.02), 2
    ),
    "teacher sgd full batch": Scenario(
        data.teacher, lambda: mlp(10, 10, (10,)), F.mse_loss, partial(sgd, lr=0.3), 1000
    ),
    "teacher heavy tails adam 16": Scenario(
        heavy_tails, lambda: mlp(10, 10, (16,)), F.mse_loss, partial(adam, lr=3e-3), 16
    ),
    "digits-mlp grows adam 64": Scenario(
        data.digits, lambda: mlp(64, 10, (2,)), F.cross_entropy, partial(adam, lr=1e-2), 64, grows=True
    ),
    "digits-cnn grows sgd 32": Scenario(
        images, lambda: cnn((2, 4)), F.cross_entropy, partial(heavy_ball, lr=0.03), 32, grows=True
    ),
}


def batches(split: data.Split, size: int, seed: int) -> Iterator[Batch]:
    """Yield batches for ever, in an order that depends on the seed alone."""
    x, y = split.train
    generator = torch.Generator().manual_seed(stream(seed, "order"))
    while True:
        order = torch.randperm(len(x), generator=generator)
        for rows in order.split(min(size, len(x))):
            yield x[rows], y[rows]


def spoil_batch(
    fault: str | None, now: bool, since: bool, batch: Batch, labels: Tensor, generator: torch.Generator
) -> Batch:
    """Return the batch with the fault in it, where the fault is one of the data."""
    x, y = batch
    if fault == "NaN in the batch" and now:
        x = x.clone()
        x.view(-1)[0] = torch.nan
    if fault == "label noise" and since:  # labels of any other examples: the same shares, nothing to learn
        y = labels[torch.randint(len(labels), (len(y),), generator=generator)]
    return x, y


def spoil_gradients(fault: str | None, now: bool, net: nn.Module) -> None:
    """Write the fault into the gradients, where it is one of theirs."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if fault == "gradient ×1000" and now:
        for gradient in gradients:
            gradient.mul_(1000)
    if fault == "NaN in a gradient" and now:
        gradients[0].view(-1)[0] = torch.nan


def drift_batch(drift: str | None, age: int, batch: Batch) -> Batch:
    """Return the batch moved along one direction, further with every step."""
    x, y = batch
    if drift == "data drift" and age > 0:
        direction = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(0))
        x = x + DRIFTS[drift] * age * direction
    return x, y


def drift_gradients(drift: str | None, age: int, net: nn.Module, generator: torch.Generator) -> None:
    """Add noise to the gradients, more with every step, in their own root mean square."""
    if drift != "gradient noise grows" or age <= 0:
        return
    for gradient in (p.grad for p in net.parameters() if p.grad is not None):
        noise = torch.randn(gradient.shape, generator=generator)
        gradient.add_(noise * gradient.square().mean().sqrt(), alpha=DRIFTS[drift] * age)
