"""The bandit suite: what every bandit must hold."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np

from esper.errors import StateError
from esper.tamiyo.bandits import Bandit

ARMS = (("fc1", 8), ("fc1", 16), ("fc2", 8))
EVEN = np.array([[0.5, -1.0, 0.3], [0.5, 0.0, 0.3], [0.5, 1.0, 0.3]])  # (arms, features); the prior first
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
        at = chosen[-1][0]
        bandit.learn(ARMS[at], EVEN[at], float(at == BEST))
    return chosen


def choices_are_arms_with_their_probability(new: Callable[[], Bandit]) -> bool:
    """An index of an arm, and a probability that is above nought: what was chosen can be weighed by it."""
    return all(index in range(len(ARMS)) and 0.0 < share <= 1.0 for index, share in played(new(), PULLS))


def the_stream_decides_alone(new: Callable[[], Bandit]) -> bool:
    """The same random stream gives the same choices: a run is repeated by its seed."""
    return played(new(), PULLS) == played(new(), PULLS)


def a_prior_counts_without_experience(new: Callable[[], Bandit]) -> bool:
    """Of arms nobody has tried the one that promises most is chosen most often."""
    rng, told = np.random.default_rng(0), EVEN.copy()
    told[:, 0] = 0.1, 0.9, 0.1
    chosen = [new().choose(ARMS, told, rng)[0] for _ in range(PULLS)]
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
        bandit.learn(ARMS[index], EVEN[index], 1.0)
    bandit.learn(("gone", 4), EVEN[0], 0.0)
    return bandit.choose(ARMS[:1], EVEN[:1], rng)[0] == 0


def experience_belongs_to_one_arm(new: Callable[[], Bandit]) -> bool:
    """Of arms that look alike in all but their names, what one brought is not credited to the other."""
    alike, bandit = np.repeat(EVEN[:1], 2, axis=0), new()
    for _ in range(PULLS):
        bandit.learn("pays", alike[0], 1.0)
        bandit.learn("does not", alike[1], 0.0)
    rng = np.random.default_rng(0)
    chosen = [bandit.choose(["does not", "pays"], alike, rng)[0] for _ in range(PULLS)]
    return chosen.count(1) > 0.8 * PULLS


def many_arms_are_not_too_many(new: Callable[[], Bandit]) -> bool:
    """A thousand arms, one of which has been seen: any of them may be chosen, none raises."""
    bandit, rng = new(), np.random.default_rng(0)
    told = np.concatenate([np.full((1000, 1), 0.5), rng.normal(size=(1000, 4))], axis=1)
    bandit.learn(7, told[7], 0.9)
    return bandit.choose(range(1000), told, rng)[0] in range(1000)


def a_foreign_state_is_refused(new: Callable[[], Bandit]) -> bool:
    """What is no state of its own is a StateError, and what was learned before stays."""
    bandit = new()
    played(bandit, 5)
    before = json.dumps(bandit.state_dict())
    for foreign in (dict[str, object](), {"arms": 3}, dict.fromkeys(bandit.state_dict())):
        try:
            bandit.load_state_dict(foreign)
        except StateError:
            continue
        return False
    return json.dumps(bandit.state_dict()) == before


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
        experience_belongs_to_one_arm,
        many_arms_are_not_too_many,
        a_foreign_state_is_refused,
        what_was_learned_goes_through_json,
    )
}
