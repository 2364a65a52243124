"""Rewards as lines over features: one that all arms share, and each arm's own deviation from it.

Linear Thompson sampling (Agrawal & Goyal 2013) over a two-level model (as in Hong et al. 2022, hierarchical
bandits). The levels are fitted in turns, each to what the other leaves: two Kalman steps an observation, and
no matrix larger than features × features, however many arms there are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from esper.errors import StateError
from esper.printable import quoted
from esper.tamiyo.beliefs.changes import Cusum
from esper.tamiyo.beliefs.means import listed, named, told

SHARED, OWN = 0.5, 0.3  # how far a reward may lie from its prior by the shared line, and by an arm's own
NOISE, TRUST = 0.2, 10  # a reward's standard deviation, and the observations that guess counts as
KEPT = 64  # observations a restart can go back to
Seen = tuple[Hashable, np.ndarray, float]  # arm, (weights,), reward


class Lines:
    """A belief about arms by their features that starts anew where the world changes.

    Args:
        columns: Number of features it reads, from the first; None: all.
        own: Whether each arm has a deviation of its own.
        threshold: Sum of surprises at which the world has changed (``Cusum``).
    """

    def __init__(self, columns: int | None, own: bool, threshold: float = 15.0) -> None:
        self.columns, self.own = columns, own
        self.cusum = Cusum(threshold)
        self.seen: deque[Seen] = deque(maxlen=KEPT)  # the latest, for a restart
        self.weights = 0  # of a line; 0: nothing was seen yet
        self.restarts = 0

    def begin(self, weights: int) -> None:
        """Believe the prior: a reward is what its prior says, give or take.

        Args:
            weights: Number of weights of a line: the features and a constant.
        """
        self.weights, self.rows = weights, dict[Hashable, int]()
        self.mean = np.zeros(weights)  # (weights,) of the shared line
        self.mean[1] = 1.0  # the first feature is the prior
        each = np.full(weights, 1 / max(weights - 2, 1))  # many features together say as much as one
        each[:2] = 1.0
        self.covariance = np.diag(each) * SHARED**2  # (weights, weights)
        self.means = np.zeros((1, weights))  # (1 + arms, weights); row 0: an arm that was never seen
        self.covariances = np.diag(each)[None] * OWN**2  # (1 + arms, weights, weights)
        self.spread, self.count = NOISE**2 * TRUST, float(TRUST)  # of residuals

    @property
    def variance(self) -> float:
        """The variance of a reward about its line: as measured, and no less than was guessed.

        While lines are uncertain the measured one is too small; with it,
        stationary worlds raised four false alarms in 400 rewards.
        """
        return max(self.spread / self.count, NOISE**2)

    def read(self, features: np.ndarray) -> np.ndarray:
        """Take the features that are read, with a constant: (..., features) to (..., weights)."""
        taken = np.asarray(features, dtype=float)[..., : self.columns]
        lines = np.concatenate([np.ones((*taken.shape[:-1], 1)), taken], axis=-1)
        if not self.weights:
            self.begin(lines.shape[-1])
        if lines.shape[-1] != self.weights:
            raise StateError(
                f"arms come with {lines.shape[-1] - 1} features, and what was learned is about "
                f"{self.weights - 1}; begin anew, or describe arms as before"
            )
        return lines

    def believed(self, arms: Sequence[Hashable], features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what is believed of arms.

        Args:
            arms: Names.
            features: (arms, features)

        Returns:
            (arms,) expected rewards, and (arms,) variances of that.
        """
        lines = self.read(features)  # (arms, weights)
        means = lines @ self.mean
        variances = ((lines @ self.covariance) * lines).sum(axis=1)
        if self.own:
            rows = [self.rows.get(arm, 0) for arm in arms]
            means = means + (lines * self.means[rows]).sum(axis=1)
            spread = (self.covariances[rows] @ lines[:, :, None])[:, :, 0]  # (arms, weights)
            variances = variances + (spread * lines).sum(axis=1)
        return means, variances

    def learn(self, arm: Hashable, features: np.ndarray, reward: float) -> float:
        """Take in one reward; where the world has changed, begin anew with what was seen since.

        Returns:
            The logarithm of the density that was given to it before.
        """
        means, variances = self.believed([arm], features[None])
        variance = float(variances[0]) + self.variance
        surprise = (reward - float(means[0])) ** 2 / variance
        self.seen.append((arm, self.read(features), reward))
        if self.cusum.tells(surprise):
            since = list(self.seen)[-self.cusum.since :]
            self.begin(self.weights)
            self.cusum, self.restarts = Cusum(self.cusum.threshold), self.restarts + 1
            for one in since:
                self.fit(*one)
        else:
            self.spread, self.count = self.spread + surprise * self.variance, self.count + 1
            self.fit(arm, self.seen[-1][1], reward)
        return -0.5 * (surprise + math.log(2 * math.pi * variance))

    def fit(self, arm: Hashable, line: np.ndarray, reward: float) -> None:
        """Move both levels towards a reward: (weights,) of features."""
        row = self.row(arm) if self.own else 0
        noise, deviation = self.variance, 0.0
        if self.own:
            deviation = float(line @ self.means[row])
            noise += float(line @ self.covariances[row] @ line)
        self.mean, self.covariance = step(self.mean, self.covariance, line, reward - deviation, noise)
        if self.own:
            left = reward - float(line @ self.mean)
            self.means[row], self.covariances[row] = step(
                self.means[row], self.covariances[row], line, left, self.variance
            )

    def row(self, arm: Hashable) -> int:
        """Return an arm's row; a new one begins as row 0 is, and room for rows doubles."""
        if arm not in self.rows:
            self.rows[arm] = len(self.rows) + 1
            if self.rows[arm] >= len(self.means):
                new = len(self.means)
                self.means = np.concatenate([self.means, np.repeat(self.means[:1], new, axis=0)])
                self.covariances = np.concatenate(
                    [self.covariances, np.repeat(self.covariances[:1], new, axis=0)]
                )
        return self.rows[arm]

    def state_dict(self) -> Mapping[str, object]:
        """Return everything believed, as JSON values."""
        if not self.weights:
            return {"weights": 0}
        return {
            "weights": self.weights,
            "shared": [self.mean.tolist(), self.covariance.tolist()],
            "arms": [
                [told(arm), self.means[row].tolist(), self.covariances[row].tolist()]
                for arm, row in self.rows.items()
            ],
            "noise": [self.spread, self.count],
            "cusum": [self.cusum.sum, self.cusum.since],
            "seen": [[told(arm), line.tolist(), reward] for arm, line, reward in self.seen],
            "restarts": self.restarts,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from what was believed.

        Raises:
            StateError: It is not what ``state_dict`` returned.
        """
        weights = state.get("weights")
        if type(weights) is not int or weights < 0 or weights == 1:
            raise StateError(f"a belief's lines have {quoted(weights)} weights; 0, or 2 and more are needed")
        read = Lines(self.columns, self.own, self.cusum.threshold)
        if weights:
            read.begin(weights)
            read._take(state)
        self.__dict__.update(read.__dict__)

    def _take(self, state: Mapping[str, object]) -> None:
        size = self.weights
        mean, covariance = pair(state, "shared")
        self.mean, self.covariance = array(mean, (size,)), array(covariance, (size, size))
        for name, own, spread in listed(state, "arms", 3, "rows of (arm, weights, covariance) are needed"):
            row = self.row(named(name))
            self.means[row], self.covariances[row] = array(own, (size,)), array(spread, (size, size))
        self.spread, self.count = (float(array(v, ())) for v in pair(state, "noise"))
        self.cusum.sum, since = (float(array(v, ())) for v in pair(state, "cusum"))
        self.cusum.since = int(since)
        for name, line, reward in listed(state, "seen", 3, "rows of (arm, features, reward) are needed"):
            self.seen.append((named(name), array(line, (size,)), float(array(reward, ()))))
        self.restarts = int(array(state.get("restarts"), ()))


def step(
    mean: np.ndarray, covariance: np.ndarray, line: np.ndarray, reward: float, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """Take one observation in: a Kalman step.

    Args:
        mean: (weights,)
        covariance: (weights, weights)
        line: (weights,) of features.
        reward: What the line should give.
        noise: Variance of the reward about it.
    """
    along = covariance @ line  # (weights,)
    gain = along / (noise + float(line @ along))
    return mean + gain * (reward - float(line @ mean)), covariance - np.outer(gain, along)


def pair(state: Mapping[str, object], key: str) -> tuple[object, object]:
    """Read two values.

    Raises:
        StateError: They are not two.
    """
    values = state.get(key)
    if not isinstance(values, list) or len(values) != 2:
        raise StateError(f"a belief's {key} is {quoted(values)}; two values are needed")
    return values[0], values[1]


def array(values: object, shape: tuple[int, ...]) -> np.ndarray:
    """Read finite numbers of a shape.

    Raises:
        StateError: They are none, or of another shape.
    """
    try:
        read = np.array(values, dtype=float)
    except (TypeError, ValueError):
        read = np.array(math.nan)
    if read.shape != shape or not np.isfinite(read).all():
        raise StateError(f"a belief has {quoted(values)}; finite numbers of shape {shape} are needed")
    return read
