"""Upper confidence bounds with prior means (UCB1, Auer et al. 2002); a prior counts as one pull."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from esper.arguments import number
from esper.tamiyo.beliefs.means import Means

__all__ = ["UCB"]


class UCB(Means):
    """Optimism under uncertainty.

    Args:
        exploration: Width of the bound. Runs make about ten decisions, so UCB1's √2 would never exploit; 0.2
            tries a neighbouring width once its prior is within a fifth of the best.

    Raises:
        ConfigError: It is no number from 0 to 1,000.
    """

    def __init__(self, exploration: float = 0.2) -> None:
        super().__init__()
        number("exploration", exploration, least=0, most=1e3)
        self.exploration = exploration

    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Return the arm with the highest bound; ties go to the first."""
        pulls, means = self.of(arms, features[:, 0])
        bounds = means + self.exploration * np.sqrt(math.log(1 + pulls.sum()) / (1 + pulls))
        return int(bounds.argmax()), 1.0
