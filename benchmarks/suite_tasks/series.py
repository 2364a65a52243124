"""A GRU that forecasts Mackey and Glass's chaotic series, dx/dt = .2·x(t−τ)/(1 + x(t−τ)^10) − .1·x(t)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.data import Split, stream, tensor
from benchmarks.suite_tasks.task import Size, SuiteTask

DELAY = 30  # τ; chaotic above 17
TIME, AHEAD = 32, 6  # points that are read, and how far ahead the next is forecast
STRIDE = 4  # between the starts of two windows
COUNTS = (1024, 256, 512)  # windows of training, probe and test
WARM_UP = 500
NOISE = 0.02  # of the measurement, in standard deviations of the series


class Forecaster(nn.Module):
    """Reads a series, forecasts from the last hidden state."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        (hidden,) = size
        self.memory, self.head = nn.GRU(1, hidden, batch_first=True), nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, 1) -> (batch, 1)
        states, _ = self.memory(x)
        return self.head(states[:, -1])


def hidden_size(net: nn.Module) -> Size:
    memory = net.get_submodule("memory")
    return (memory.hidden_size,)


def mackey_glass(length: int, seed: int) -> np.ndarray:
    """Integrate by Euler's method with step 1 from a random history; noise is added at the end."""
    random = np.random.default_rng(stream(seed, "split"))
    series = list(0.5 + random.random(DELAY + 1))
    for _ in range(WARM_UP + length):
        late = series[-1 - DELAY]
        series.append(series[-1] + 0.2 * late / (1 + late**10) - 0.1 * series[-1])
    values = np.array(series[-length:])
    values = (values - values.mean()) / values.std()
    return values + NOISE * random.standard_normal(length)


@cache
def series(seed: int) -> Split:
    """Cut one series by time into training, probe and test windows that do not overlap between parts."""
    lengths = [count * STRIDE + TIME + AHEAD for count in COUNTS]
    values = mackey_glass(sum(lengths), seed)
    chosen = []
    for count, part in zip(COUNTS, np.split(values, np.cumsum(lengths)[:-1]), strict=True):
        starts = np.arange(count) * STRIDE
        inputs = part[starts[:, None] + np.arange(TIME)]
        chosen.append((tensor(inputs)[:, :, None], tensor(part[starts + TIME + AHEAD - 1])[:, None]))
    return Split(*chosen)


TASKS = (
    SuiteTask(
        name="gru",
        selection=False,
        split=series,
        network=Forecaster,
        read=hidden_size,
        sizes=((4,), (8,), (16,), (32,)),
        loss=F.mse_loss,
        metric="loss",
        optimizer=torch.optim.Adam,
        rates=(3e-3, 1e-2, 3e-2),
        steps=30 * 16,
        batch=64,
    ),
)
