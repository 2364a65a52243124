"""One seed for everything a run draws from."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's streams; a ``DataLoader``'s workers draw theirs from torch's."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
