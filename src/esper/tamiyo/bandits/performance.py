"""As performance has been: a softmax over mean rewards (Boltzmann exploration, Sutton & Barto §2.8)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from esper.arguments import number
from esper.tamiyo.beliefs.means import Means

__all__ = ["Performance"]


class Performance(Means):
    """Chooses in proportion to what arms have brought.

    Args:
        temperature: Difference of mean rewards at which the better arm is chosen e times as often.

    Raises:
        ConfigError: It is no number from 1e-6 to 1,000.
    """

    def __init__(self, temperature: float = 0.05) -> None:
        super().__init__()
        number("temperature", temperature, least=1e-6, most=1e3)
        self.temperature = temperature

    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Draw an arm from the softmax."""
        means = self.of(arms, features[:, 0])[1]
        shares = np.exp((means - means.max()) / self.temperature)  # (arms,)
        shares /= shares.sum()
        chosen = int(rng.choice(len(arms), p=shares))
        return chosen, float(shares[chosen])
