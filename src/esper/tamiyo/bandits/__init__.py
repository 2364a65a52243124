"""Bandits: how one arm is chosen among many. The file's name is the bandit's name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np


class Bandit(Protocol):
    """Chooses arms and learns from delayed rewards in [0, 1]."""

    def choose(
        self, arms: Sequence[Hashable], priors: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Return the index of the chosen arm and the probability with which it was chosen.

        Args:
            arms: Names of what may be chosen now; they persist between calls.
            priors: (arms,) expected reward before any experience, in [0, 1].
            rng: The policy's own random stream.
        """

    def learn(self, arm: Hashable, reward: float) -> None:
        """Take in what an arm brought."""

    def state_dict(self) -> Mapping[str, object]:
        """Return everything learned, as JSON values."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from what was learned."""
