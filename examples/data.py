"""Real data that comes inside scikit-learn, split into what trains, what decides growth, and what judges."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits, load_wine
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


def digits(seed: int = 0, batch_size: int = 64) -> dict[str, DataLoader]:
    """1797 handwritten digits of 8×8 pixels in 0..1."""
    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16, dtype=torch.float32)
    return split(inputs, torch.tensor(labels), seed, batch_size)


def wine(seed: int = 0, batch_size: int = 16) -> dict[str, DataLoader]:
    """13 measurements of 178 wines of three cultivars, standardised."""
    columns, labels = load_wine(return_X_y=True)
    inputs = torch.tensor(columns, dtype=torch.float32)
    return split(inputs, torch.tensor(labels), seed, batch_size, probe=1 / 3, standardise=True)


def split(
    inputs: Tensor, targets: Tensor, seed: int, batch_size: int, probe: float = 0.2, standardise: bool = False
) -> dict[str, DataLoader]:
    """Shuffle, take 20 % for validation, and of the rest the probe, which is not trained on.

    A small probe proves little: 28 wines left a held-out gain of 0.4 nats to chance, 47 did not.
    """
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    held_out = len(order) // 5
    train_from = held_out + int((len(order) - held_out) * probe)
    val, probing, train = order.tensor_split([held_out, train_from])
    if standardise:  # by what the training part knows
        inputs = (inputs - inputs[train].mean(0)) / inputs[train].std(0)

    def part(rows: Tensor) -> TensorDataset:
        return TensorDataset(inputs[rows], targets[rows])

    own_order = torch.Generator().manual_seed(seed)  # nobody else's draws change the order of training
    return {
        "train": DataLoader(part(train), batch_size, shuffle=True, generator=own_order),
        "val": DataLoader(part(val), batch_size=256),
        "probe": DataLoader(part(probing), batch_size=256),
    }
