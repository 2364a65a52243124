"""The demo's real data, its two hosts, and the training of the nets they are held against."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from esper.contracts import Event, Observer
from esper.errors import MissingExtraError
from esper.kasmina.recording.flops import FlopMeter
from esper.nissa.run.journal import RunJournal
from esper.tolaria.growth import Growth, grow

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError:
    raise MissingExtraError("scikit-learn", "demo", "the demo's handwritten digits") from None

BATCH = 64
PROGRESS_EVERY = 20  # steps, as in esper.config
Batch = tuple[Tensor, Tensor]
Widths = tuple[int, ...]


class MLP(nn.Module):
    """64 pixels, one hidden layer, 10 digits."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, widths[0])
        self.out = nn.Linear(widths[0], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 64) to (batch, 10)."""
        return self.out(self.hidden(x).relu())

    @property
    def widths(self) -> Widths:
        """Hidden units."""
        return (self.hidden.out_features,)


class CNN(nn.Module):
    """Two convolutions on 8x8 pixels, each followed by pooling, then 10 digits."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.out = nn.Linear(4 * second, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 64) to (batch, 10)."""
        x = self.pool(self.conv1(x.view(-1, 1, 8, 8)).relu())  # (batch, first, 4, 4)
        x = self.pool(self.conv2(x).relu())  # (batch, second, 2, 2)
        return self.out(x.flatten(1))

    @property
    def widths(self) -> Widths:
        """Channels."""
        return self.conv1.out_channels, self.conv2.out_channels


@dataclass(frozen=True)
class Task:
    """A host that was guessed too small, and how it is trained."""

    name: str
    title: str
    host: type[MLP | CNN]
    small: Widths
    budget: float  # how many times its parameters it may grow to
    epochs: int = 60
    rate: float = 3e-3  # Adam; the rate the digits bench chooses for the growing nets

    def build(self, widths: Widths, seed: int) -> MLP | CNN:
        """Make the host with the weights of a seed."""
        torch.manual_seed(seed)
        return self.host(widths)


TASKS = (
    Task("mlp", "MLP with 2 hidden units", MLP, (2,), budget=15.0),  # room for 32 hidden units
    Task("cnn", "CNN with 2 and 4 channels", CNN, (2, 4), budget=20.0),  # room for 15 and 30 channels
)


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 digits of 8x8 pixels: 60 % to train on, 15 % to gate growth, 25 % to judge."""

    train: Batch
    probe: list[Batch]
    test: Batch

    @classmethod
    def split(cls, seed: int) -> Digits:
        """Split by a seed, each digit in proportion."""
        bunch: Any = load_digits()  # scikit-learn has no types
        labels = bunch.target
        rest, test = train_test_split(range(len(labels)), test_size=0.25, stratify=labels, random_state=seed)
        train, probe = train_test_split(rest, test_size=0.2, stratify=labels[rest], random_state=seed)
        x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(labels)
        batches = list(zip(x[probe].split(BATCH), y[probe].split(BATCH), strict=True))
        return cls((x[train], y[train]), batches, (x[test], y[test]))

    def batches(self, order: torch.Generator) -> Iterator[Batch]:
        """Go once through the training part in a fresh order."""
        x, y = self.train
        for rows in torch.randperm(len(y), generator=order).split(BATCH):
            yield x[rows], y[rows]

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch."""
        return -(-len(self.train[1]) // BATCH)

    def accuracy(self, net: nn.Module) -> float:
        """Judge a net on the part nothing was trained or decided on."""
        x, y = self.test
        net.eval()
        with torch.no_grad():
            right = (net(x).argmax(1) == y).float().mean()  # (examples, 10) → (examples,) → ()
        net.train()
        return float(right)


class Cost(TypedDict):
    """What a net came to, and what it cost."""

    accuracy: float
    parameters: int
    flops: int  # of training
    seconds: float


def loss_fn(net: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a batch."""
    return cross_entropy(net(batch[0]), batch[1])


def train_grown(
    task: Task, data: Digits, folder: Path, seed: int, watch: Observer
) -> tuple[MLP | CNN, Growth]:
    """Train and grow a task's host: a plain loop with Esper's three lines.

    Args:
        task: Host, its widths and how it is trained.
        data: Digits trained and judged on.
        folder: Path of the run's folder.
        seed: Seed of weights, order and growth.
        watch: Function called with every event.
    """
    net = task.build(task.small, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=task.rate)
    growth = grow(
        net,
        optimizer,
        loss_fn,
        probe=data.probe,
        steps=task.epochs * data.steps,
        run_dir=folder,
        seed=seed,
        budget={"growth_factor": task.budget},
        on_event=watch,
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        for batch in data.batches(order):
            loss = loss_fn(net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            growth.step(batch, loss)
        growth.epoch({"accuracy": data.accuracy(net)})
    growth.finish()
    return net, growth


def train_fixed(task: Task, widths: Widths, data: Digits, folder: Path, seed: int, watch: Observer) -> Cost:
    """Train a net of given widths the same way without growing; its run folder tells its curves.

    Args:
        task: Host and how it is trained.
        widths: Units or channels of its layers, in order.
        data: Digits trained and judged on.
        folder: Path of the run's folder.
        seed: Seed of weights and order.
        watch: Function called with every event.

    Returns:
        Accuracy, parameters, training FLOPs and seconds.
    """
    net = task.build(widths, seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=task.rate)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    flops, spent, step = forward_flops(net, data), 0, 0
    losses: list[float] = []
    begun = time.perf_counter()
    with RunJournal(folder) as journal:

        def tell(kind: str, **facts: object) -> None:
            event = Event(kind, step, facts)
            journal(event)
            watch(event)

        def progress() -> dict[str, object]:
            seconds = time.perf_counter() - begun
            return {"parameters": parameters, "growth_flops": 0, "training_flops": spent, "seconds": seconds}

        tell(
            "run_started",
            model=type(net).__name__,
            parameters=parameters,
            flops=flops,
            sites=[],
            refused=[],
            budget={},
            seed=seed,
            steps=task.epochs * data.steps,
        )
        order = torch.Generator().manual_seed(seed)
        for epoch in range(1, task.epochs + 1):
            for batch in data.batches(order):
                loss = loss_fn(net, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                step += 1
                spent += 3 * flops * len(batch[1])  # backward costs twice the forward pass
                if step % PROGRESS_EVERY == 0:
                    tell("progress", loss=sum(losses) / len(losses), **progress())
                    losses.clear()
            tell("epoch", epoch=epoch, metrics={"accuracy": data.accuracy(net)})
        seconds = time.perf_counter() - begun
        tell("run_finished", flops=flops, grown=[], **progress())
    return {"accuracy": data.accuracy(net), "parameters": parameters, "flops": spent, "seconds": seconds}


def forward_flops(net: nn.Module, data: Digits) -> int:
    """Count one forward pass of one example with the counter that growth uses."""
    x = data.test[0][:1]
    with torch.no_grad(), FlopMeter() as meter:
        net(x)
    return meter.total
