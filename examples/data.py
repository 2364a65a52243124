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
    return split((inputs - inputs.mean(0)) / inputs.std(0), torch.tensor(labels), seed, batch_size)


def split(inputs: Tensor, targets: Tensor, seed: int, batch_size: int) -> dict[str, DataLoader]:
    """Shuffle, and take 20 % for validation; the probe is 20 % of the rest, and is not trained on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(inputs), generator=generator)
    held_out = len(order) // 5
    probe = held_out + (len(order) - held_out) // 5
    parts = {"val": order[:held_out], "probe": order[held_out:probe], "train": order[probe:]}
    return {
        name: DataLoader(
            TensorDataset(inputs[rows], targets[rows]),
            batch_size=batch_size if name == "train" else 256,
            shuffle=name == "train",
            generator=generator,
        )
        for name, rows in parts.items()
    }
