"""Upper confidence bounds with prior means (UCB1, Auer et al. 2002); a prior counts as one pull."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from esper.errors import StateError
from esper.printable import quoted

__all__ = ["UCB"]


class UCB:
    """Optimism under uncertainty.

    Args:
        exploration: Width of the bound. Runs make about ten decisions, so UCB1's √2 would never exploit; 0.2
            tries a neighbouring width once its prior is within a fifth of the best.
    """

    def __init__(self, exploration: float = 0.2) -> None:
        self.exploration = exploration
        self.pulls: dict[Hashable, int] = {}
        self.sums: dict[Hashable, float] = {}

    def choose(
        self, arms: Sequence[Hashable], priors: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Return the arm with the highest bound; ties go to the first."""
        pulls = np.array([self.pulls.get(arm, 0) for arm in arms])
        sums = np.array([self.sums.get(arm, 0.0) for arm in arms])
        means = (priors + sums) / (1 + pulls)
        bounds = means + self.exploration * np.sqrt(math.log(1 + pulls.sum()) / (1 + pulls))
        return int(bounds.argmax()), 1.0

    def learn(self, arm: Hashable, reward: float) -> None:
        """Add one observation."""
        self.pulls[arm] = self.pulls.get(arm, 0) + 1
        self.sums[arm] = self.sums.get(arm, 0.0) + reward

    def state_dict(self) -> Mapping[str, object]:
        """Return counts and sums."""
        return {
            "arms": [
                [list(arm) if isinstance(arm, tuple) else arm, n, self.sums[arm]]
                for arm, n in self.pulls.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take counts and sums back.

        Raises:
            StateError: It is not what ``state_dict`` returned.
        """
        told = state["arms"]
        if not isinstance(told, list):
            raise StateError(f"the bandit's arms are {quoted(told)}; a list of (arm, pulls, sum) is needed")
        rows = [(tuple(arm) if isinstance(arm, list) else arm, n, total) for arm, n, total in told]
        self.pulls = {arm: n for arm, n, _ in rows}
        self.sums = {arm: total for arm, _, total in rows}
