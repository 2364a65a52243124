"""The founding four on beliefs whose right answer can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from esper.config import load_config
from esper.errors import ConfigError
from esper.tamiyo.bandits.epsilon_greedy import EpsilonGreedy
from esper.tamiyo.bandits.performance import Performance
from esper.tamiyo.bandits.thompson import Thompson
from esper.tamiyo.controller import Tamiyo

TWO = np.array([[0.6], [0.5]])  # priors
CALLS = 2000

SETTINGS = {
    "ucb": "exploration",
    "contextual": "exploration",
    "thompson": "noise",
    "performance": "temperature",
    "epsilon_greedy": "epsilon",
}


def test_thompson_chooses_an_arm_as_often_as_it_is_the_best_of_the_drawn_beliefs() -> None:
    rng, bandit = np.random.default_rng(0), Thompson(noise=0.2)
    told = [bandit.choose(["a", "b"], TWO, rng) for _ in range(CALLS)]
    exact = 0.5 * (1 + math.erf(0.1 / (0.2 * math.sqrt(2)) / math.sqrt(2)))  # of N(0.6, 0.2²) > N(0.5, 0.2²)
    chosen = [index for index, _ in told]
    assert chosen.count(0) / CALLS == pytest.approx(exact, abs=0.03)
    assert np.mean([share for index, share in told if index == 0]) == pytest.approx(exact, abs=0.03)
    weighed = sum(1 / share for index, share in told if index == 1) / CALLS
    assert weighed == pytest.approx(1.0, abs=0.1)  # what a weighed log says of an arm is not biased


def test_epsilon_greedy_tells_the_probability_of_the_mixture() -> None:
    rng, bandit = np.random.default_rng(0), EpsilonGreedy(epsilon=0.2)
    told = [bandit.choose(["a", "b"], TWO, rng) for _ in range(CALLS)]
    assert dict(told) == {0: pytest.approx(0.9), 1: pytest.approx(0.1)}
    assert [index for index, _ in told].count(1) / CALLS == pytest.approx(0.1, abs=0.02)


def test_performance_is_a_softmax_over_means() -> None:
    rng, bandit = np.random.default_rng(0), Performance(temperature=0.1)
    bandit.learn("b", TWO[1], 0.9)  # (0.5 + 0.9) / 2 = 0.7
    shares = dict(bandit.choose(["a", "b"], TWO, rng) for _ in range(99))
    assert shares == {0: pytest.approx(1 / (1 + math.e)), 1: pytest.approx(math.e / (1 + math.e))}


def test_settings_reach_the_bandit_and_a_wrong_one_is_named() -> None:
    made = Tamiyo(load_config({"bandit": "thompson", "bandit_settings": {"noise": 0.5}}), 100, 4)
    assert isinstance(made.selector.bandit, Thompson)
    assert made.selector.bandit.noise == 0.5
    with pytest.raises(ConfigError, match=r"bandit_settings: thompson does not take 'nose'; .*noise"):
        Tamiyo(load_config({"bandit": "thompson", "bandit_settings": {"nose": 0.5}}), 100, 4)
    with pytest.raises(ConfigError, match="auto does not take 'noise'; it takes none"):
        Tamiyo(load_config({"bandit": "auto", "bandit_settings": {"noise": 0.5}}), 100, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1, 1e308])
@pytest.mark.parametrize("name", ["ucb", "contextual", "thompson", "performance", "epsilon_greedy"])
def test_settings_are_finite_and_in_range(name: str, value: float) -> None:
    setting = SETTINGS[name]
    with pytest.raises(ConfigError, match=f"bandit_settings of {name}: {setting}=.*; give a number from"):
        Tamiyo(load_config({"bandit": name, "bandit_settings": {setting: value}}), 100, 4)


@pytest.mark.parametrize(("name", "value"), [("performance", 0.0), ("epsilon_greedy", 1.1)])
def test_settings_at_the_edge(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=SETTINGS[name]):
        Tamiyo(load_config({"bandit": name, "bandit_settings": {SETTINGS[name]: value}}), 100, 4)
