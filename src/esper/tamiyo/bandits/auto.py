"""Follows whichever belief has predicted rewards best: arms by themselves, one line, or a line for each arm.

Every belief learns from every reward, so none has to be tried to be judged, as the experts of Exp4 have: what
decides is how likely each had called the rewards that came (prequential evidence, Dawid 1984).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from esper.errors import StateError
from esper.printable import quoted
from esper.tamiyo.beliefs.draws import by_draws
from esper.tamiyo.beliefs.lines import Lines, array

__all__ = ["Auto"]

FORGOTTEN = 0.02  # of the evidence at every reward: what held a hundred rewards ago may not hold now
EXPLORATION = {"means": 0.7, "line": 0.4, "lines": 0.4}  # shares of the beliefs' deviations that are drawn


class Auto:
    """Chooses by the belief that evidence speaks for; at first by the arms' own means."""

    def __init__(self) -> None:
        self.beliefs = {
            "means": Lines(columns=1, own=True),
            "line": Lines(columns=None, own=False),
            "lines": Lines(columns=None, own=True),
        }
        self.evidence = dict.fromkeys(self.beliefs, 0.0)  # logarithms

    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        """Draw from the belief with the most evidence; ties go to the simpler one."""
        name = max(self.evidence, key=self.evidence.__getitem__)
        means, variances = self.beliefs[name].believed(arms, features)
        return by_draws(means, EXPLORATION[name] * np.sqrt(variances), rng)

    def learn(self, arm: Hashable, features: np.ndarray, reward: float) -> None:
        """Let every belief learn, and count how likely it had held the reward."""
        for name, belief in self.beliefs.items():
            likely = belief.learn(arm, features, reward)
            self.evidence[name] = (1 - FORGOTTEN) * self.evidence[name] + likely

    def state_dict(self) -> Mapping[str, object]:
        """Return the beliefs and what speaks for them."""
        return {name: [self.evidence[name], belief.state_dict()] for name, belief in self.beliefs.items()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take them back.

        Raises:
            StateError: It is not what ``state_dict`` returned.
        """
        new = Auto()
        for name, belief in new.beliefs.items():
            told = state.get(name)
            if not isinstance(told, list) or len(told) != 2 or not isinstance(told[1], dict):
                raise StateError(f"belief {name} is {quoted(told)}; its evidence and its state are needed")
            new.evidence[name] = float(array(told[0], ()))
            belief.load_state_dict(told[1])
        self.beliefs, self.evidence = new.beliefs, new.evidence
