"""scikit-learn's handwritten digits: an MLP, a CNN, and a CNN with BatchNorm trained by SGD."""

from __future__ import annotations

from functools import cache, partial

import torch
from torch.nn import functional as F

from benchmarks import data
from benchmarks.data import Split
from benchmarks.suite_tasks.networks import cnn, hidden_widths, mlp
from benchmarks.suite_tasks.task import SuiteTask


@cache
def vectors(seed: int) -> Split:
    return data.digits(seed)


@cache
def images(seed: int) -> Split:
    return data.digits(seed, images=True)


digits = partial(SuiteTask, read=hidden_widths, loss=F.cross_entropy, metric="accuracy", batch=64)

TASKS = (
    digits(
        name="digits-mlp",
        selection=True,
        split=vectors,
        network=partial(mlp, 64, 10),
        sizes=((2,), (4,), (8,), (16,), (32,)),
        optimizer=torch.optim.Adam,
        rates=(3e-3, 1e-2, 3e-2),
        steps=60 * 17,
    ),
    digits(
        name="digits-cnn",
        selection=True,
        split=images,
        network=cnn,
        sizes=((2, 4), (4, 8), (8, 16), (16, 32)),
        optimizer=torch.optim.Adam,
        rates=(3e-3, 1e-2, 2e-2),
        steps=60 * 17,
    ),
    digits(
        name="digits-cnn-bn",
        selection=False,
        split=images,
        network=partial(cnn, normalised=True),
        sizes=((2, 4), (4, 8), (8, 16), (16, 32)),
        optimizer=partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4),
        rates=(1e-2, 3e-2, 1e-1),
        steps=40 * 17,
    ),
)
