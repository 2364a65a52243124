"""The bandit suite: what every bandit must hold."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from esper.tamiyo.bandits import Bandit

ARMS = (("fc1", 8), ("fc1", 16), ("fc2", 8))
EVEN = np.full(len(ARMS), 0.5)
PULLS = 60
BEST = 2  # the arm that pays, of those above


def check_bandit(new: Callable[[], Bandit]) -> list[tuple[str, bool]]:
    """Hold a bandit to every demand of its contract.

    Args:
        new: Function that returns one without experience, another one each time.

    Returns:
        Each demand, and whether it holds.
    """
    return [(name.replace("_", " "), demand(new)) for name, demand in DEMANDS.items()]


def played(bandit: Bandit, pulls: int, seed: int = 0) -> list[tuple[int, float]]:
    """Let a bandit play against arms of which one pays; returns what it chose, and how likely that was."""
    rng, chosen = np.random.default_rng(seed), list[tuple[int, float]]()
    for _ in range(pulls):
        chosen.append(bandit.choose(ARMS, EVEN, rng))
        bandit.learn(ARMS[chosen[-1][0]], float(chosen[-1][0] == BEST))
    return chosen


def choices_are_arms_with_their_probability(new: Callable[[], Bandit]) -> bool:
    """An index of an arm, and a probability that is above nought: what was chosen can be weighed by it."""
    return all(index in range(len(ARMS)) and 0.0 < share <= 1.0 for index, share in played(new(), PULLS))


def the_stream_decides_alone(new: Callable[[], Bandit]) -> bool:
    """The same random stream gives the same choices: a run is repeated by its seed."""
    return played(new(), PULLS) == played(new(), PULLS)


def a_prior_counts_without_experience(new: Callable[[], Bandit]) -> bool:
    """Of arms nobody has tried the one that promises most is chosen most often."""
    rng, priors = np.random.default_rng(0), np.array([0.1, 0.9, 0.1])
    chosen = [new().choose(ARMS, priors, rng)[0] for _ in range(PULLS)]
    return chosen.count(1) > PULLS / 2


def what_pays_is_chosen_more(new: Callable[[], Bandit]) -> bool:
    """Late choices fall on the arm that pays more often than an even draw would."""
    late = [index for index, _ in played(new(), PULLS)][-PULLS // 2 :]
    return late.count(BEST) > len(late) / len(ARMS)


def rewards_may_come_late(new: Callable[[], Bandit]) -> bool:
    """An arm is chosen again before its reward has come, and rewards come for arms no longer there."""
    bandit, rng = new(), np.random.default_rng(0)
    first, second = (bandit.choose(ARMS, EVEN, rng)[0] for _ in range(2))
    for index in (first, second):
        bandit.learn(ARMS[index], 1.0)
    bandit.learn(("gone", 4), 0.0)
    return bandit.choose(ARMS[:1], EVEN[:1], rng)[0] == 0


def what_was_learned_goes_through_json(new: Callable[[], Bandit]) -> bool:
    """A bandit that takes over a state, read back from JSON, goes on as the other would have."""
    one, other = new(), new()
    played(one, PULLS // 2)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    return played(one, PULLS, seed=1) == played(other, PULLS, seed=1)


DEMANDS: dict[str, Callable[[Callable[[], Bandit]], bool]] = {
    demand.__name__: demand
    for demand in (
        choices_are_arms_with_their_probability,
        the_stream_decides_alone,
        a_prior_counts_without_experience,
        what_pays_is_chosen_more,
        rewards_may_come_late,
        what_was_learned_goes_through_json,
    )
}
