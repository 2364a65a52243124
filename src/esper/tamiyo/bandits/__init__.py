"""Bandits: how one arm is chosen among many. A file's name is its bandit's, the arguments are settings."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np


class Bandit(Protocol):
    """Chooses arms and learns from delayed rewards in [0, 1].

    What is known of an arm when it is chosen is a row of features; the first one is its prior: the reward
    that is expected of it before any experience, in [0, 1].
    """

    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Return the index of the chosen arm and the probability with which it was chosen.

        Args:
            arms: Names of what may be chosen now; they persist between calls.
            features: (arms, features) What is known of each now; as many features at every call.
            rng: The policy's own random stream.
        """

    def learn(self, arm: Hashable, features: np.ndarray, reward: float) -> None:
        """Take in what an arm brought.

        Args:
            arm: Name of the arm.
            features: (features,) Its row when it was chosen.
            reward: Number in [0, 1].
        """

    def state_dict(self) -> Mapping[str, object]:
        """Return everything learned, as JSON values."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from what was learned.

        Raises:
            StateError: It is not what ``state_dict`` of this bandit returns.
        """
