"""Thompson sampling (1933) with Gaussian beliefs: an arm is chosen as often as it may be the best."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from esper.arguments import number
from esper.tamiyo.beliefs.draws import by_draws
from esper.tamiyo.beliefs.means import Means

__all__ = ["Thompson"]


class Thompson(Means):
    """Beliefs are drawn when an arm is chosen, never before.

    Args:
        noise: Standard deviation of a reward about its arm's mean.

    Raises:
        ConfigError: It is no number from 0 to 1,000.
    """

    def __init__(self, noise: float = 0.2) -> None:
        super().__init__()
        number("noise", noise, least=0, most=1e3)
        self.noise = noise

    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Draw from the beliefs; an arm is chosen with the share of the draws that it wins."""
        pulls, means = self.of(arms, features[:, 0])
        return by_draws(means, self.noise / np.sqrt(1 + pulls), rng)
