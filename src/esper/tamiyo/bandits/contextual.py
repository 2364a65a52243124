"""Linear Thompson sampling over features of arms (Agrawal & Goyal 2013): a new arm is not a blank one."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from esper.arguments import number
from esper.tamiyo.beliefs.draws import by_draws
from esper.tamiyo.beliefs.lines import Lines

__all__ = ["Contextual"]


class Contextual:
    """Believes in a line that all arms share and in each arm's own deviation; begins anew after a change.

    Args:
        exploration: Share of a belief's deviation that is drawn. Features differ from choice to choice, which
            explores by itself (Bastani et al. 2021): 1 had up to twice the regret of 0.4.

    Raises:
        ConfigError: It is no number from 0 to 1,000.
    """

    def __init__(self, exploration: float = 0.4) -> None:
        number("exploration", exploration, least=0, most=1e3)
        self.exploration = exploration
        self.lines = Lines(columns=None, own=True)

    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Draw from the beliefs; an arm is chosen with the share of the draws that it wins."""
        means, variances = self.lines.believed(arms, features)
        return by_draws(means, self.exploration * np.sqrt(variances), rng)

    def learn(self, arm: Hashable, features: np.ndarray, reward: float) -> None:
        """Move the lines."""
        self.lines.learn(arm, features, reward)

    def state_dict(self) -> Mapping[str, object]:
        """Return the lines."""
        return self.lines.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take them back.

        Raises:
            StateError: It is not what ``state_dict`` returned.
        """
        self.lines.load_state_dict(state)
