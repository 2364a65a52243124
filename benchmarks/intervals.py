"""Means with their standard error, and paired differences with a 95 % t interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student


@dataclass(frozen=True)
class Mean:
    """The mean over seeds; ``sem`` is None where one seed cannot tell."""

    mean: float
    sem: float | None
    count: int

    def show(self, digits: int = 4) -> str:
        return f"{self.mean:.{digits}f}" + ("" if self.sem is None else f"±{self.sem:.{digits}f}")


@dataclass(frozen=True)
class Paired:
    """The mean of a − b over pairs, with the ends of its 95 % interval (None with fewer than two pairs)."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def show(self, digits: int = 4) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.{digits}f}"
        return f"{self.mean:+.{digits}f} [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"


def mean_of(values: Sequence[float]) -> Mean:
    """Average finite or non-finite figures alike: a diverged run must not vanish from a mean."""
    if not values:
        raise ValueError("no values to average")
    mean = sum(values) / len(values)
    return Mean(mean, standard_error(values, mean), len(values))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Paired:
    """Compare two arms run on the same seeds: the interval is Student's t on the n differences."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    mean = mean_of(differences)
    if mean.sem is None:
        return Paired(mean.mean, None, None, mean.count)
    half = float(student.ppf(0.975, mean.count - 1)) * mean.sem
    return Paired(mean.mean, mean.mean - half, mean.mean + half, mean.count)


def standard_error(values: Sequence[float], mean: float) -> float | None:
    if len(values) < 2 or not math.isfinite(mean):
        return None
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
