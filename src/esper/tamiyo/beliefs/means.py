"""The mean reward of each arm: a prior counts as one pull."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from esper.errors import StateError
from esper.printable import quoted

NEEDED = "a list of (arm, pulls, sum) is needed"


class Means:
    """Pulls and rewards of arms, each for itself: what one brought says nothing of its neighbours."""

    def __init__(self) -> None:
        self.pulls: dict[Hashable, int] = {}
        self.sums: dict[Hashable, float] = {}

    def of(self, arms: Sequence[Hashable], priors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the pulls and the means of arms.

        Args:
            arms: Names.
            priors: (arms,) Rewards expected before any experience.

        Returns:
            (arms,) numbers of pulls, and (arms,) means with the prior as one more.
        """
        pulls = np.array([self.pulls.get(arm, 0) for arm in arms])
        sums = np.array([self.sums.get(arm, 0.0) for arm in arms])
        return pulls, (priors + sums) / (1 + pulls)

    def learn(self, arm: Hashable, features: np.ndarray, reward: float) -> None:
        """Add one observation; of what was known of the arm nothing is asked."""
        self.pulls[arm] = self.pulls.get(arm, 0) + 1
        self.sums[arm] = self.sums.get(arm, 0.0) + reward

    def state_dict(self) -> Mapping[str, object]:
        """Return counts and sums."""
        return {"arms": [[told(arm), n, self.sums[arm]] for arm, n in self.pulls.items()]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take counts and sums back.

        Raises:
            StateError: It is not what ``state_dict`` returned.
        """
        rows = listed(state, "arms", 3, NEEDED)
        pulls, sums = dict[Hashable, int](), dict[Hashable, float]()
        for name, count, total in rows:
            arm = named(name)
            if type(count) is not int or count < 1 or not isinstance(total, int | float):
                raise StateError(f"the bandit's arm {quoted(name)} has {quoted([count, total])}; {NEEDED}")
            pulls[arm], sums[arm] = count, float(total)
        self.pulls, self.sums = pulls, sums


def told(arm: Hashable) -> object:
    """Say an arm's name as JSON can."""
    return list(arm) if isinstance(arm, tuple) else arm


def named(arm: object) -> Hashable:
    """Read an arm's name back.

    Raises:
        StateError: It is no name.
    """
    if isinstance(arm, list) and all(isinstance(part, str | int | float) for part in arm):
        return tuple(arm)
    if isinstance(arm, str | int | float):
        return arm
    raise StateError(f"a bandit's arm is named {quoted(arm)}; text, a number or a list of them is needed")


def listed(state: Mapping[str, object], key: str, fields: int, needed: str) -> list[list[object]]:
    """Read rows of so many fields each.

    Raises:
        StateError: They are none.
    """
    rows = state.get(key)
    if not isinstance(rows, list):
        raise StateError(f"the bandit's {key} are {quoted(rows)}; {needed}")
    for row in rows:
        if not isinstance(row, list) or len(row) != fields:
            raise StateError(f"the bandit's {key} have {quoted(row)} among them; {needed}")
    return rows
