"""The bandit on problems whose answer is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from esper.config import load_config
from esper.errors import RegistryError, StateError
from esper.tamiyo.bandits.ucb import UCB
from esper.tamiyo.controller import BANDITS, Tamiyo

RNG = np.random.default_rng(0)
NONE = np.zeros(1)  # features of an arm that was chosen
ARMS = [("a>b", 0.5, "svd"), ("a>b", 1.0, "svd"), ("b>c", 1.0, "random")]


def told(*priors: float) -> np.ndarray:
    """(arms, 1): of each arm its prior is known and nothing else."""
    return np.array(priors)[:, None]


def test_before_any_experience_the_best_prior_is_chosen_and_ties_go_to_the_first() -> None:
    assert UCB().choose(ARMS, told(0.2, 0.9, 0.5), RNG) == (1, 1.0)
    assert UCB().choose(ARMS, told(0.4, 0.4, 0.4), RNG) == (0, 1.0)


def test_one_failure_halves_the_belief_in_an_arm() -> None:
    bandit = UCB()
    bandit.learn(ARMS[1], NONE, 0.0)
    assert bandit.choose(ARMS, told(0.2, 0.9, 0.8), RNG)[0] == 2
    assert bandit.choose(ARMS, told(0.0, 0.9, 0.1), RNG)[0] == 1


def test_it_finds_the_best_arm_and_mostly_stays_with_it() -> None:
    worth, rng, bandit = [0.2, 0.5, 0.8], np.random.default_rng(0), UCB()
    chosen = []
    for _ in range(300):
        index, _ = bandit.choose(ARMS, told(0.5, 0.5, 0.5), rng)
        chosen.append(index)
        bandit.learn(ARMS[index], NONE, float(rng.random() < worth[index]))
    assert chosen[-100:].count(2) > 80
    assert set(chosen) == {0, 1, 2}


@pytest.mark.parametrize(
    ("given", "even"),
    [
        ({"exploration": 1.0}, 0.4745),  # 1/2 + √(ln 5 / 4) = reward / 2 + √(ln 5 / 2), by hand
        ({}, 0.8949),  # 1/2 + 0.2 √(ln 5 / 4) = reward / 2 + 0.2 √(ln 5 / 2)
    ],
)
def test_the_bound_is_ucb1_s_with_a_prior_that_counts_as_one_pull(
    given: dict[str, float], even: float
) -> None:
    for reward, best in ((even - 0.001, 0), (even + 0.001, 1)):
        bandit = UCB(**given)
        for _ in range(3):
            bandit.learn("often", NONE, 0.5)
        bandit.learn("once", NONE, reward)
        assert bandit.choose(["often", "once"], told(0.5, 0.0), RNG)[0] == best


def test_more_exploration_visits_more() -> None:
    def visits(exploration: float) -> int:
        bandit = UCB(exploration)
        for _ in range(60):
            index, _ = bandit.choose(ARMS, told(0.5, 0.5, 0.5), RNG)
            bandit.learn(ARMS[index], NONE, [0.4, 0.5, 0.6][index])
        return min(bandit.pulls.get(arm, 0) for arm in ARMS)

    assert visits(0.0) < visits(0.5) < visits(3.0)


def test_arms_that_are_not_offered_are_remembered() -> None:
    bandit = UCB()
    bandit.learn(ARMS[0], NONE, 1.0)
    bandit.choose(ARMS[1:], told(0.1, 0.1), RNG)
    assert bandit.choose(ARMS, told(0.5, 0.5, 0.5), RNG)[0] == 0


def test_what_was_learned_survives_json() -> None:
    bandit, other = UCB(), UCB()
    for reward, arm in enumerate([*ARMS, ARMS[0], "plain"]):
        bandit.learn(arm, NONE, reward / 5)
    state = bandit.state_dict()
    assert json.loads(json.dumps(state)) == state
    other.load_state_dict(state)
    assert (other.pulls, other.sums) == (bandit.pulls, bandit.sums)


@pytest.mark.parametrize("told", [3, None, "arms", {"a": 1}])
def test_a_state_that_is_none_of_its_own_is_refused_and_nothing_is_forgotten(told: object) -> None:
    bandit = UCB()
    bandit.learn(ARMS[0], NONE, 1.0)
    with pytest.raises(StateError, match=r"the bandit's arms are .*; a list of"):
        bandit.load_state_dict({"arms": told})
    assert (bandit.pulls, bandit.sums) == ({ARMS[0]: 1}, {ARMS[0]: 1.0})


def test_a_bandit_is_a_name_and_a_miss_lists_what_exists() -> None:
    assert BANDITS.get("ucb") is UCB
    with pytest.raises(RegistryError, match="ucb"):
        Tamiyo(load_config({"bandit": "ubc"}), 100, 4)
