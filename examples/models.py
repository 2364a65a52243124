"""Models that were guessed too small; the configs beside this file let them grow."""

from __future__ import annotations

from torch import nn


def digits_mlp(hidden: int = 2) -> nn.Module:
    """64 pixels, one hidden layer, 10 digits."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def digits_cnn(first: int = 4, second: int = 8) -> nn.Module:
    """Two convolutions on 8×8 pixels; both may grow."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, first, 3, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * second, 10),
    )


def tabular_mlp(features: int = 13, hidden: int = 1, classes: int = 3) -> nn.Module:
    """Columns of a table, one hidden layer, classes."""
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))
