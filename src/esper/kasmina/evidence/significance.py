"""Is the mean gain of held-out examples above nought, or chance? A p-value for the mean, and its budget.

Two one-sided tests are made, and the larger p-value counts, so that one of them suffices to keep the promise:

* Student's t over the means of contiguous blocks: neighbours may be correlated (rows of one text, windows in
  time order), blocks are taken as independent.
* Empirical likelihood over the examples (Owen 1988), made as if one more example had been seen, a bad one
  (adjusted, Chen, Variyath & Abraham 2008): rare large losses make the mean of a sample too good, and its
  spread too small, together.

Measured by `esper bench evidence` over normal, skewed, heavy-tailed and correlated gains, at 0.05 to
0.0002: at most 1.2 budgets within Monte Carlo's error but in one cell (64 means of 16 examples of which .02
lose .5: 2.0 at 0.0002), where Student's t over single examples takes up to 97 on skewed and 1,000 on
correlated ones; Johnson's and Hall's corrections, the bootstrap-t, Catoni's mean and bets on signs or
clipped values took 2 to 600.

Nothing can be honest about the mean of *every* distribution (Bahadur & Savage 1956): a loss that an example
shows with chance q is unknown to (1 − q)^n of the probes, which pass if they are long enough (N4's, 64
examples: 0.0096). Nor is the promise made for neighbours correlated over more than a block (AR(1) of .9
over 32: up to 35 budgets at 0.0002, unless ``blocks`` is given), and for ones correlated and skewed at once
(up to 16).
"""

from __future__ import annotations

import math
from typing import NotRequired, TypedDict

import numpy as np

from esper.errors import ConfigError, ProbeError, StateError

FEWEST = 8  # values; below, the spread itself is not known
# Size of the unseen bad example, in root-mean-square values; never below the worst one seen. Of 3 to 6, 5 is
# the least that holds at 0.0002 for 1 - lognormal (4 missed twofold), and costs little power from 270 on.
UNSEEN = 5.0
UNSEEN_BLOCK = 1.5  # for values that are means of 16 examples or more: what is rare has been averaged in
# Of the false-keep budget, event by event: little while a host has hardly learned, for then it gains by
# anything, and what needed growing least was grown (breast cancer: 7 of 20 runs at .0125, 1 at .0025).
SPENT = (0.02, 0.03, 0.07, 0.16, 0.26, 0.26)
FLOOR = 1e-12  # smaller p-values are not told apart


def p_value(values: np.ndarray, *, blocks: int | None = None) -> float | None:
    """Return how likely a mean as high as this is where the true one is not above nought.

    Args:
        values: (n,) gains of held-out examples, in the order of the probe.
        blocks: Number of contiguous blocks that are independent of one another; chosen by n if left out
            (neighbours up to 8 apart may then be correlated). Give ``len(values)`` where every value
            is the mean of a block already, of 16 examples or more.

    Returns:
        A p-value, one-sided; None where nothing can be said: fewer than 8 values, some not finite, all equal.
    """
    given = np.asarray(values, dtype=np.float64).reshape(1, -1)
    if given.shape[1] < FEWEST or not np.isfinite(given).all() or (given == given[0, 0]).all():
        return None
    return float(p_values(given, blocks)[0])


def p_values(rows: np.ndarray, blocks: int | None = None) -> np.ndarray:
    """Return the p-value of every row, (rows,), of (rows, n) finite values that are not all equal."""
    n = rows.shape[1]
    scaled = rows / np.abs(rows).max(axis=1, keepdims=True)
    found = student(block_means(scaled, starts(n, blocks)))
    return np.maximum(found, likelihood(scaled, UNSEEN_BLOCK if blocks == n else UNSEEN))


def starts(n: int, blocks: int | None) -> np.ndarray:
    """Cut n examples into contiguous blocks; left to choose, of 8, 16 from 256 on and 32 from 1,024 on."""
    if blocks is not None:
        blocks = min(max(blocks, 2), n)
        return np.arange(blocks) * n // blocks
    length = max(n // FEWEST, 1) if n < 64 else 8 if n < 256 else 16 if n < 1024 else 32
    return np.arange(n // length) * length  # the last block takes the rest, shorter than a block


def block_means(rows: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Average contiguous blocks: (rows, n) to (rows, blocks), by their share in the mean, which is kept."""
    mean = rows.mean(axis=1, keepdims=True)
    return np.add.reduceat(rows - mean, cuts, axis=1) * (len(cuts) / rows.shape[1]) + mean


def student(rows: np.ndarray) -> np.ndarray:
    """Return the one-sided p of Student's t that the mean of each row is not above nought."""
    n = rows.shape[1]
    mean, spread = rows.mean(axis=1), rows.std(axis=1, ddof=1) / math.sqrt(n)
    even = spread == 0.0  # all blocks alike: certain, or nothing at all
    t = np.where(even, np.copysign(np.inf, mean), mean / np.where(even, 1.0, spread))
    return t_tail(np.where(mean == 0.0, 0.0, t), n - 1)


def likelihood(rows: np.ndarray, unseen: float) -> np.ndarray:
    """Return the one-sided p of the empirical likelihood ratio, an unseen bad example included."""
    n = rows.shape[1]
    worst = np.maximum(unseen * np.sqrt(np.square(rows).mean(axis=1)), -rows.min(axis=1))  # (rows,)
    ratio = log_ratio(np.concatenate([rows, -worst[:, None]], axis=1) / worst[:, None])
    return t_tail(np.sqrt(n * np.expm1(2 * ratio / (n + 1))), n)  # the t of a normal ratio as large


def log_ratio(rows: np.ndarray) -> np.ndarray:
    """Return max over λ in [0, 1) of Σ log(1 + λx), for rows whose smallest value is −1; by bisection."""
    low, high = np.zeros(len(rows)), np.ones(len(rows))
    for _ in range(30):
        middle = 0.5 * (low + high)
        rising = (rows / (1.0 + middle[:, None] * rows)).sum(axis=1) > 0
        low, high = np.where(rising, middle, low), np.where(rising, high, middle)
    return np.maximum(np.log1p(low[:, None] * rows).sum(axis=1), 0.0)


def t_tail(t: np.ndarray, freedom: int) -> np.ndarray:
    """Return P(T > t) of Student's distribution, by its finite sum (Abramowitz & Stegun 26.7.3–4)."""
    angle = np.arctan(t / math.sqrt(freedom))
    sine, square = np.sin(angle), np.square(np.cos(angle))
    odd = freedom % 2
    term = np.cos(angle) if odd else np.ones_like(angle)
    total = term.copy() if freedom > 1 else np.zeros_like(angle)
    for k in range(2 + odd, freedom - 1, 2):
        term = term * square * ((k - 1) / k)
        total = total + term
    inside = (2 / math.pi) * (angle + sine * total) if odd else sine * total  # P(−t < T < t), signed
    return np.clip(0.5 - 0.5 * inside, FLOOR, 1.0)


def smallest(alpha: float, *, of_blocks: bool = False) -> int:
    """Return the fewest values that could pass at ``alpha``: all gains nearly equal.

    Args:
        alpha: The largest p-value that passes.
        of_blocks: Every value is a block's mean.

    Raises:
        ProbeError: No number could: p-values are not told apart below 1e-12.
    """
    if alpha < FLOOR:
        raise ProbeError(
            f"no probe can pass at {alpha}: p-values end at {FLOOR}; share the budget by fewer looks"
        )
    unseen = UNSEEN_BLOCK if of_blocks else UNSEEN

    def passes(n: int) -> bool:
        return float(likelihood(np.ones((1, n)), unseen)[0]) <= alpha

    low, high = FEWEST - 1, FEWEST
    while not passes(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


class SpentState(TypedDict):
    """What a run has tested."""

    budget: float
    looks: list[list[int]]  # (event, places) of each
    paid: NotRequired[bool]  # absent in states of earlier versions


class Spending:
    """The run's false-keep budget, spent over events whose number is not known in advance.

    The first six events are given .02 to .26 of it, each later one, k = 1, 2, …, the rest / (k(k + 1)); the
    places tested in one event share it evenly (union bound), so it holds whatever the looks have in common.

    Once an event has paid, that nothing helps is refuted, and with it what the budget is for: how large, not
    whether, is then the question, and each later event may spend ``further`` (alpha-investing, Foster & Stine
    2008). Without it runs that had grown once stopped half-way, on some seeds and not on others.

    Args:
        budget: Probability that a run keeps anything where nothing helps.
        further: Probability that each event may spend after one that has paid.

    Attributes:
        paid: True once an event has.
    """

    def __init__(self, budget: float, further: float | None = None) -> None:
        if not 0 < budget < 1:
            raise ConfigError(f"the false-keep budget is {budget}; give a probability between 0 and 1")
        self.budget, self.further = budget, further
        self.paid = False
        self.looks: dict[int, int] = {}  # event to places

    def threshold(self, event_index: int, places: int) -> float:
        """Return the largest p-value that passes, for each of ``places`` tested in one event.

        Raises:
            StateError: A negative event, no place, or an event that was tested on another number of places.
        """
        if event_index < 0 or places < 1:
            raise StateError(f"event {event_index} with {places} places; events count from 0, places from 1")
        if self.looks.setdefault(event_index, places) != places:
            raise StateError(
                f"event {event_index} was tested on {self.looks[event_index]} places, and now on {places}: "
                "its budget is spent; number the second test as an event of its own"
            )
        return self.share(event_index) / places

    def share(self, event_index: int) -> float:
        """Return what one event may spend."""
        if self.paid and self.further is not None:
            return self.further
        if event_index < len(SPENT):
            return SPENT[event_index] * self.budget
        later = event_index - len(SPENT) + 1
        return (1 - sum(SPENT)) * self.budget / (later * (later + 1))

    @property
    def most(self) -> float:
        """The most that an event may spend before one has paid."""
        return max(SPENT) * self.budget

    @property
    def spent(self) -> float:
        """What the events so far have spent."""
        return sum(self.share(event) for event in self.looks)

    def state_dict(self) -> SpentState:
        """Return what was tested so far."""
        looks = [[event, n] for event, n in sorted(self.looks.items())]
        return {"budget": self.budget, "looks": looks, "paid": self.paid}

    def load_state_dict(self, state: SpentState) -> None:
        """Go on where a run was left.

        Raises:
            StateError: The state was spent from another budget.
        """
        if state["budget"] != self.budget:
            raise StateError(
                f"the saved run spends a false-keep budget of {state['budget']}, this one {self.budget}; "
                "resume with the saved budget"
            )
        self.looks = {int(event): int(places) for event, places in state["looks"]}
        self.paid = bool(state.get("paid", False))
