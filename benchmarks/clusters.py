"""What interrupted runs learn, in one process or several: clusters that every look blurs anew."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Clusters(Dataset[tuple[Tensor, int]]):
    """Every look at an example adds other noise, from torch's, NumPy's and Python's streams.

    Args:
        classes: Clusters, and dimensions.
        length: Examples.
        noise: How much is added; it may change as the run goes on.
    """

    def __init__(self, classes: int, length: int, noise: float) -> None:
        self.classes, self.length, self.noise = classes, length, noise

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % self.classes
        noise = torch.randn(self.classes) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return 2 * torch.eye(self.classes)[label] + self.noise * noise, label


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def refuse(*given: Any) -> None:
    """Raise in a kernel's place."""
    raise RuntimeError("a kernel that was made to raise")
