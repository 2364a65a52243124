"""The data of every bench, split per seed; the probe comes out of the training data for every arm."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

PURPOSES = ("split", "init", "order", "growth")
TEST_SHARE, PROBE_SHARE = 0.25, 0.2


def stream(seed: int, purpose: str) -> int:
    """Give each use of chance its own seed: arms share data, initial weights and order, nothing else."""
    return int(np.random.SeedSequence([seed, PURPOSES.index(purpose)]).generate_state(1)[0])


@dataclass(frozen=True)
class Split:
    """Inputs and targets: ``train`` moves weights, ``probe`` chooses rates and gates growth."""

    train: tuple[Tensor, Tensor]
    probe: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def teacher(seed: int, train: int = 1000, held_out: int = 250, test: int = 1000) -> Split:
    """Draw GradMax's teacher: 10-10-10, ReLU, no biases, weights U(−1, 1), inputs N(0, 1).

    The notebook trains on 1000 examples; the probe is drawn beside them and no arm trains on it, so that the
    GFLOP of the paper's figure 3a stay comparable.
    """
    generator = torch.Generator().manual_seed(stream(seed, "split"))
    inner, outer = (torch.rand(10, 10, generator=generator) * 2 - 1 for _ in range(2))
    inputs = torch.randn(train + held_out + test, 10, generator=generator)
    targets = (inputs @ inner.T).relu() @ outer.T
    sizes = [train, held_out, test]
    return Split(*zip(inputs.split(sizes), targets.split(sizes), strict=True))


def digits(seed: int, images: bool = False, shuffled: bool = False) -> Split:
    """Split scikit-learn's handwritten digits (1797 of 8x8, 10 classes), stratified.

    Args:
        seed: Chooses the split.
        images: Shape (N, 1, 8, 8) instead of (N, 64).
        shuffled: Permute the labels: nothing can be learnt from them.
    """
    bunch = load_digits()
    labels = bunch.target
    if shuffled:
        labels = np.random.default_rng(stream(seed, "split")).permutation(labels)
    shape = (-1, 1, 8, 8) if images else (-1, 64)
    pieces = parts(bunch.data / 16.0, labels, seed)
    return Split(*((tensor(x).reshape(shape), torch.as_tensor(y)) for x, y in pieces))


def breast_cancer(seed: int) -> Split:
    """Split the 569 tumours of 30 features, standardised by the training part."""
    bunch = load_breast_cancer()
    train, probe, test = parts(bunch.data, bunch.target, seed)
    mean, deviation = train[0].mean(axis=0), train[0].std(axis=0)
    return Split(*((tensor((x - mean) / deviation), torch.as_tensor(y)) for x, y in (train, probe, test)))


def parts(inputs: np.ndarray, labels: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut into training (60 %), probe (15 %) and test (25 %), each class in proportion."""
    random = stream(seed, "split") % 2**31
    rest, test, rest_labels, test_labels = train_test_split(
        inputs, labels, test_size=TEST_SHARE, stratify=labels, random_state=random
    )
    train, probe, train_labels, probe_labels = train_test_split(
        rest, rest_labels, test_size=PROBE_SHARE, stratify=rest_labels, random_state=random
    )
    return [(train, train_labels), (probe, probe_labels), (test, test_labels)]


def tensor(values: np.ndarray) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32)
