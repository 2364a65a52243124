"""What is trained: data, networks by their hidden widths, and how an ordinary user would train them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import data
from benchmarks.data import Split, stream

Widths = tuple[int, ...]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A host, its data and its training recipe; ``score`` is accuracy or the mean squared error."""

    name: str
    split: Callable[[int], Split]
    layers: Callable[[Widths], nn.Sequential]
    small: Widths
    big: Widths
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    higher_is_better: bool
    optimizer: Callable[..., torch.optim.Optimizer]
    rates: tuple[float, ...]
    epochs: int
    batch: int | None  # None: full batch, one step per epoch
    initialise: Callable[[Tensor], Tensor] | None = None  # of weights; None: torch's own
    limit: Widths | None = None  # growth may reach the parameters of these widths; None: of the big ones
    events: int | None = None  # widenings growth may keep; None: Esper's default
    growth: Mapping[str, Any] = field(default_factory=dict)  # what a user of esper.grow would set

    def build(self, widths: Widths, seed: int) -> nn.Sequential:
        """Build the network with initial weights that depend on widths and seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "init"))
            net = self.layers(widths)
            if self.initialise is not None:
                for parameter in net.parameters():
                    self.initialise(parameter)
        return net

    def batches(self, split: Split, seed: int) -> Iterable[Batch]:
        """Feed the training data in an order that depends on the seed alone."""
        if self.batch is None:
            return [split.train]
        order = torch.Generator().manual_seed(stream(seed, "order"))
        return DataLoader(TensorDataset(*split.train), self.batch, shuffle=True, generator=order)


def mlp(inputs: int, outputs: int, widths: Widths, bias: bool = True) -> nn.Sequential:
    (hidden,) = widths
    return nn.Sequential(nn.Linear(inputs, hidden, bias), nn.ReLU(), nn.Linear(hidden, outputs, bias))


def cnn(widths: Widths) -> nn.Sequential:
    """Build the 8x8 network: two 3x3 convolutions, each pooled by 2, then one linear layer."""
    first, second = widths
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 2 * 2, 10),
    )


def hidden_widths(net: nn.Module) -> Widths:
    """Read the hidden widths back, whatever grew: all layers but the last."""
    sizes = [len(module.weight) for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return tuple(sizes[:-1])


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).float().mean())


def squared_error(outputs: Tensor, targets: Tensor) -> float:
    return float(F.mse_loss(outputs, targets))


digits_recipe = partial(
    Task,
    loss=F.cross_entropy,
    score=accuracy,
    higher_is_better=True,
    optimizer=torch.optim.Adam,
    rates=(3e-3, 5e-3, 1e-2, 2e-2, 3e-2),
    epochs=60,
    batch=64,
)

TASKS = {
    task.name: task
    for task in (
        # GradMax's notebook: Keras' Glorot start, plain SGD on the full batch, 200 + 4·200 + 500 steps.
        Task(
            name="student-teacher",
            split=data.teacher,
            layers=partial(mlp, 10, 10, bias=False),
            small=(5,),
            big=(10,),
            loss=F.mse_loss,
            score=squared_error,
            higher_is_better=False,
            optimizer=torch.optim.SGD,
            rates=(0.1, 0.3, 0.5, 1.0),
            epochs=1500,
            batch=None,
            initialise=nn.init.xavier_uniform_,
            # One unit of slack: with the teacher's ten, 6 of 20 runs end in a local minimum, fixed or grown.
            limit=(11,),
            events=5,
            growth={
                "schedule": {"warmup": 0.05, "stop": 0.6},
                "race": {"steps": 16},
                "widths": {"shares": [1.0, 2.0]},
            },
        ),
        digits_recipe(
            "digits-mlp",
            data.digits,
            partial(mlp, 64, 10),
            (2,),
            (32,),
            events=2,
            growth={"race": {"steps": 32, "candidates": 4}},
        ),
        # From 4-8 channels the gate refuses most widenings: that network reaches 0.957 by itself.
        digits_recipe(
            "digits-cnn",
            partial(data.digits, images=True),
            cnn,
            (2, 4),
            (16, 32),
            events=3,
            growth={"schedule": {"stop": 0.85}, "race": {"candidates": 4}},
        ),
        digits_recipe("breast-cancer", data.breast_cancer, partial(mlp, 30, 2), (8,), (32,)),
        digits_recipe(
            "shuffled-digits", partial(data.digits, shuffled=True), partial(mlp, 64, 10), (8,), (32,)
        ),
    )
}
