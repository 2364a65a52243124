"""From beliefs to a choice whose probability is known."""

from __future__ import annotations

import numpy as np

DRAWS = 64  # of each belief; with 64 arms 60 µs


def by_draws(means: np.ndarray, deviations: np.ndarray, rng: np.random.Generator) -> tuple[int, float]:
    """Choose an arm with the share of the draws in which it is the best.

    That is Thompson sampling, whose probabilities have no formula; chosen from the shares of draws, the
    probability is exact given the draws, so that what was logged can be weighed by it.

    Args:
        means: (arms,) Expected rewards.
        deviations: (arms,) Standard deviations of what is believed of them.
        rng: The policy's own random stream.

    Returns:
        The index of the chosen arm, and the probability with which it was chosen.
    """
    draws = means + deviations * rng.standard_normal((DRAWS, len(means)))  # (draws, arms)
    wins = draws.argmax(axis=1)  # (draws,)
    chosen = int(wins[rng.integers(DRAWS)])
    return chosen, float((wins == chosen).mean())
