"""What is usual for one signal of a run: quantiles of its recent values on a robust logarithmic scale."""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass
from typing import TypedDict

WINDOW = 128  # recent values a new one is compared with
LEAST = 24  # values before anything is judged
FLOOR = 0.05  # of the run's first median: below it the scale is linear, a loss near 0 has no decades
SPREAD = 0.1  # least spread, in e-folds: a full batch hardly varies
LONG, RANKED = 512, 48  # recent values a new one is ranked among, and how many there must be
COMMON = 1.8  # -log of the share of values as high that is no evidence yet: one in six
BRIEF = 8  # steps that are summed up at most: a slow rise is divergence
UPPER = 1.15  # spreads from the median to the 7/8 quantile of a normal distribution


@dataclass(frozen=True, slots=True)
class Level:
    """How one value stands to the recent ones."""

    value: float
    usual: float  # their median, in the value's own unit
    size: float  # how far above it, in spreads
    beyond: float  # how far above their 99th percentile, in e-folds


class BaselineState(TypedDict):
    """What a baseline remembers."""

    recent: list[float]  # scaled, in order of arrival
    first: list[float]  # raw, until the unit is known
    unit: float | None


class TailState(TypedDict):
    """What a tail score remembers."""

    recent: list[float]  # in order of arrival
    sum: float
    since: int  # step


class RobustBaseline:
    """Remembers what is usual for one signal.

    Args:
        window: Values remembered.
    """

    def __init__(self, window: int = WINDOW) -> None:
        self.recent: deque[float] = deque(maxlen=window)  # scaled, in order of arrival
        self.ordered: list[float] = []  # the same, sorted: quantiles without sorting, 1 µs a step
        self.first: list[float] = []  # raw, until the unit is known
        self.unit: float | None = None

    def scaled(self, value: float) -> float:
        """Return a value on the scale that is linear near 0, logarithmic beyond; losses may be negative."""
        assert self.unit is not None
        return math.asinh(value / (2 * self.unit))

    def level(self, value: float) -> Level | None:
        """Compare a finite value with the recent ones; None while too few are known."""
        count = len(self.ordered)
        if self.unit is None or count < LEAST:
            return None
        ordered, scaled = self.ordered, self.scaled(value)
        median = ordered[count // 2]
        # The upper half alone: a falling loss spreads downwards, which says nothing about rises.
        spread = max((ordered[(count * 7) // 8] - median) / UPPER, SPREAD)
        usual = 2 * self.unit * math.sinh(median)
        return Level(value, usual, (scaled - median) / spread, scaled - ordered[count - 1 - count // 100])

    def add(self, value: float) -> None:
        """Remember a finite value."""
        if self.unit is None:
            self.first.append(value)
            if len(self.first) >= LEAST:
                self._begin()
            return
        if len(self.recent) == self.recent.maxlen:
            del self.ordered[bisect.bisect_left(self.ordered, self.recent[0])]
        scaled = self.scaled(value)
        self.recent.append(scaled)
        bisect.insort(self.ordered, scaled)

    def _begin(self) -> None:
        middle = sorted(abs(value) for value in self.first)[len(self.first) // 2]
        if middle > 0:
            self.unit = FLOOR * middle
            self.recent.extend(self.scaled(value) for value in self.first)
            self.ordered = sorted(self.recent)
        self.first.clear()

    def forget(self) -> None:
        """Start afresh on the same scale: the run has a new normal."""
        self.recent.clear()
        self.ordered.clear()

    def state_dict(self) -> BaselineState:
        """Return what is remembered."""
        return {"recent": list(self.recent), "first": list(self.first), "unit": self.unit}

    def load_state_dict(self, state: BaselineState) -> None:
        """Go on remembering."""
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.ordered = sorted(self.recent)
        self.first, self.unit = list(state["first"]), state["unit"]


class TailScore:
    """Sums up how rare values are: -log of the share of recent ones as high, less what is common.

    No scale is needed, so that it also serves batches of a few examples, whose loss has two humps: all right,
    or one wrong.

    Args:
        window: Values remembered.
    """

    def __init__(self, window: int = LONG) -> None:
        self.recent: deque[float] = deque(maxlen=window)
        self.ordered: list[float] = []
        self.sum, self.since = 0.0, 0  # and the step it began at

    def look(self, value: float, step: int) -> float:
        """Return the sum with a new value, which is not remembered yet."""
        count = len(self.ordered)
        if count < RANKED:
            return 0.0
        above = 1 + count - bisect.bisect_left(self.ordered, value)
        if step - self.since >= BRIEF:
            self.sum = 0.0
        if self.sum == 0.0:
            self.since = step
        self.sum = max(self.sum + max(-math.log(above / (count + 1)) - COMMON, -COMMON), 0.0)
        return self.sum

    def add(self, value: float) -> None:
        """Remember a value."""
        if len(self.recent) == self.recent.maxlen:
            del self.ordered[bisect.bisect_left(self.ordered, self.recent[0])]
        self.recent.append(value)
        bisect.insort(self.ordered, value)

    def forget(self) -> None:
        """Start afresh."""
        self.recent.clear()
        self.ordered.clear()
        self.sum = 0.0

    def state_dict(self) -> TailState:
        """Return what is remembered."""
        return {"recent": list(self.recent), "sum": self.sum, "since": self.since}

    def load_state_dict(self, state: TailState) -> None:
        """Go on remembering."""
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.ordered = sorted(self.recent)
        self.sum, self.since = state["sum"], state["since"]
