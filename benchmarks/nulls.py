"""Held-out gains whose mean is exactly nought, as probes may hold them: skewed, heavy-tailed, correlated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Draw = Callable[[np.random.Generator, int, int], np.ndarray]  # random numbers, rows, n to (rows, n)


@dataclass(frozen=True)
class Null:
    """How gains are drawn where growth does not help.

    Attributes:
        draw: (rows, n) values, every row a probe.
        seen: Probability that an example shows what is rare; a probe that shows none of it cannot know.
        alike: Neighbours that are correlated; 1 where all are independent.
        fits: Whether the default blocks of n examples hold the neighbours that are correlated.
    """

    draw: Draw
    seen: float = 1.0
    alike: int = 1

    def fits(self, n: int) -> bool:
        return self.alike == 1 or self.alike <= (
            n // 8 if n < 64 else 8 if n < 256 else 16 if n < 1024 else 32
        )


def two_points(chance: float, bad: float, good: float, noise: float) -> Draw:
    """Draw rare losses and common small gains, whose mean is moved to nought where it is not."""
    mean = chance * bad + (1 - chance) * good

    def draw(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        return np.where(rng.random((rows, n)) < chance, bad, good) - mean + rng.normal(0, noise, (rows, n))

    return draw


def groups(size: int, one: Draw) -> Draw:
    """Repeat every example, as a probe does that holds copies."""
    return lambda rng, rows, n: np.repeat(one(rng, rows, -(-n // size)), size, axis=1)[:, :n]


def autoregressive(rho: float, length: int = 32) -> Draw:
    """Draw texts of ``length`` examples, each correlated with the one before."""

    def draw(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
        values = rng.normal(size=(rows, n))
        for i in range(n):
            if i % length:
                values[:, i] = rho * values[:, i - 1] + np.sqrt(1 - rho**2) * values[:, i]
        return values

    return draw


def normal(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    return rng.normal(size=(rows, n))


def lognormal(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    return np.exp(rng.normal(size=(rows, n))) - np.exp(0.5)


def exponential(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    return rng.exponential(size=(rows, n)) - 1.0


def mostly_nothing(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    return np.where(rng.random((rows, n)) < 0.1, rng.normal(size=(rows, n)), 0.0)


NULLS = {
    "normal": Null(normal),
    "lognormal, rare gains": Null(lognormal),
    "lognormal, rare losses": Null(lambda rng, rows, n: -lognormal(rng, rows, n)),
    "exponential, rare losses": Null(lambda rng, rows, n: -exponential(rng, rows, n)),
    "N4: .07 lose .14": Null(two_points(0.07, -0.14, 0.01, 0.003), seen=0.07),
    ".02 lose .5": Null(two_points(0.02, -0.5, 0.01, 0.003), seen=0.02),
    ".02 lose .5, noise .05": Null(two_points(0.02, -0.5, 0.01, 0.05), seen=0.02),
    "t, 3 df": Null(lambda rng, rows, n: rng.standard_t(3, size=(rows, n))),
    "t, 2.2 df": Null(lambda rng, rows, n: rng.standard_t(2.2, size=(rows, n))),
    "nine of ten nothing": Null(mostly_nothing),
    "AR .5 in 32": Null(autoregressive(0.5), alike=32),
    "AR .9 in 32": Null(autoregressive(0.9), alike=32),
    "4 identical rows": Null(groups(4, normal), alike=4),
    "8 identical rows": Null(groups(8, normal), alike=8),
}
# Correlated and skewed at once: printed, not promised. The blocks see the one, the likelihood the other.
BOTH = {"4 rows, rare losses": Null(groups(4, lambda rng, rows, n: -exponential(rng, rows, n)), alike=4)}
