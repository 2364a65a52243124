"""The best mean, and now and then any arm (Sutton & Barto, Reinforcement Learning, §2.2)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from esper.arguments import number
from esper.tamiyo.beliefs.means import Means

__all__ = ["EpsilonGreedy"]


class EpsilonGreedy(Means):
    """Greedy, but for a share of the choices.

    Args:
        epsilon: Share of the choices that are drawn evenly.

    Raises:
        ConfigError: It is no number from 0 to 1.
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        super().__init__()
        number("epsilon", epsilon, least=0, most=1)
        self.epsilon = epsilon

    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Return the best mean, or any arm; ties go to the first."""
        best = int(self.of(arms, features[:, 0])[1].argmax())
        chosen = int(rng.integers(len(arms))) if rng.random() < self.epsilon else best
        return chosen, self.epsilon / len(arms) + (1 - self.epsilon) * (chosen == best)
