"""Every bandit holds the shipped suite, and the suite finds what it is for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pytest

from esper.tamiyo.bandits.ucb import UCB
from esper.tamiyo.controller import BANDITS
from esper.testing.bandits import DEMANDS, check_bandit

HELD = [(name.replace("_", " "), True) for name in DEMANDS]


@pytest.mark.parametrize("name", BANDITS.names())
def test_every_bandit_keeps_the_contract(name: str) -> None:
    assert check_bandit(BANDITS.get(name)) == HELD


class Forgetful(UCB):
    def load_state_dict(self, state: Mapping[str, object]) -> None:
        pass


class Deaf(UCB):
    def learn(self, arm: Hashable, features: np.ndarray, reward: float) -> None:
        pass


class Stubborn(UCB):
    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        return 0, 0.0


class Moody(UCB):
    def choose(
        self, arms: Sequence[Hashable], features: np.ndarray, rng: np.random.Generator
    ) -> tuple[int, float]:
        return int(np.random.default_rng().integers(len(arms))), 1.0


class OneForAll(UCB):
    def learn(self, arm: Hashable, features: np.ndarray, reward: float) -> None:
        super().learn("any", features, reward)


@pytest.mark.parametrize(
    ("kind", "missed"),
    [
        (Forgetful, {"a foreign state is refused", "what was learned goes through json"}),
        (Deaf, {"experience belongs to one arm", "what pays is chosen more"}),
        (OneForAll, {"experience belongs to one arm", "what pays is chosen more"}),
        (
            Stubborn,
            {
                "choices are arms with their probability",
                "a prior counts without experience",
                "experience belongs to one arm",
                "what pays is chosen more",
            },
        ),
    ],
)
def test_the_suite_finds_what_it_is_for(kind: type[UCB], missed: set[str]) -> None:
    assert {name for name, held in check_bandit(kind) if not held} == missed


def test_a_bandit_with_a_stream_of_its_own_is_found() -> None:
    assert ("the stream decides alone", False) in check_bandit(Moody)
