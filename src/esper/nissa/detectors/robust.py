"""Tests of a run's vital signs: values that are not finite, spikes, slow divergence, a jump of the rate.

Popular detectors cry wolf, with 6 to 14 false alarms per 1,000 healthy steps (measured), because a batch's
loss is skewed and its spread changes as the run goes on. Here only size far beyond anything recent, or
evidence that sums up over steps in loss and gradient together, is an alarm. No clock, no randomness; the same
numbers in give the same findings out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypedDict, cast

from esper.nissa.baseline import LEAST, BaselineState, RobustBaseline, TailScore, TailState
from esper.nissa.detectors import Finding, Vitals

__all__ = ["Detectors"]

# Tuned on 22 healthy runs of seeds that the bench does not report; in them the largest were 2.1 (loss),
# 1.3 (gradient) and 7.6 (the sum).
BEYOND = {"loss": 2.5, "gradient": 2.5}  # e-folds above the 99th percentile of the recent values
DOUBT = 0.7  # e-folds above it that do not become usual behind a graft
CAP, DRAIN, ENOUGH = 5.0, 3.0, 10.0  # evidence of a signal and step at most, what fades a step, an alarm
RARE = 7.0  # summed up rarity of losses that is an alarm; 5.8 gave 2 in 81,000 healthy steps
JUMP = 10.0  # times the largest learning rate so far, in one step
BLOCK = 64  # steps whose quartiles are compared to find a slow rise
RISE = 0.5  # e-folds between the medians of the best block and one that diverges
BLOCKS = 2  # in a row that have to
REST = 8  # steps from an alarm until the next of its kind
FROZEN = 32  # steps after a spike in which nothing new becomes usual


class DetectorsState(TypedDict):
    """What the tests remember."""

    signals: dict[str, BaselineState]
    rarity: TailState
    evidence: list[float]  # sum, its first step, highest rate, steps seen, last frozen step, worse blocks
    resting: dict[str, int]  # kind -> last step without a new alarm
    grace: list[int | str | float]  # last step, why, e-folds excused
    block: list[float]
    best: list[float] | None  # median and upper quartile


class Detectors:
    """Looks at one step's vital signs after another."""

    def __init__(self) -> None:
        self.signals = {"loss": RobustBaseline(), "gradient": RobustBaseline()}
        self.rarity = TailScore()  # of the loss
        self.evidence = 0.0  # summed up
        self.since = 0  # first step of the evidence
        self.highest = 0.0  # learning rate so far
        self.seen = 0  # steps
        self.resting: dict[str, int] = {}  # kind -> last step without a new alarm
        self.frozen = -1  # last step in which nothing new becomes usual
        self.grace, self.why = -1, ""  # last step of an expected discontinuity
        self.excused = 0.0  # e-folds it may go beyond
        self.block: list[float] = []  # scaled losses
        self.best: tuple[float, float] | None = None  # median and upper quartile of the best block
        self.worse = 0  # blocks in a row

    def expect(self, step: int, why: str, steps: int, excused: float = math.inf) -> None:
        """Annotate instead of alarm until ``step + steps``.

        Values that are not finite, or more than ``excused`` e-folds beyond the recent ones, stay alarms.
        """
        if step + steps >= self.grace:
            self.grace, self.why, self.excused = step + steps, why, excused

    def look(self, vitals: Vitals, step: int) -> Finding | None:
        """Return the gravest finding of a step."""
        self.seen += 1
        bad = lost(vitals)
        if bad is not None:
            return Finding("nonfinite", bad, step, None, None, None, step)
        found = self._spike(vitals, step) or self._rate(vitals, step) or self._divergence(vitals.loss, step)
        if found is None:
            return None
        # What was expected puts no alarm to rest: a seed that explodes passes through what a graft may do.
        name = f"{found.kind}, expected" if found.expected else found.kind
        if step <= self.resting.get(name, -1):
            return None
        self.resting[name] = step + REST
        return found

    def _expected(self, step: int, beyond: float = 0.0) -> str:
        return self.why if step <= self.grace and beyond <= self.excused else ""

    def _doubtful(self, step: int, beyond: float) -> bool:
        """Tell whether a value is too high to become usual: an explosion would excuse itself by steps."""
        return step <= self.grace and beyond > DOUBT and math.isfinite(self.excused)

    def _spike(self, vitals: Vitals, step: int) -> Finding | None:
        found, evidence = None, 0.0
        for name, value in (("loss", vitals.loss), ("gradient", vitals.gradient)):
            if value is None:
                continue
            usual = self.signals[name]
            level = usual.level(value)
            if step > self.frozen and not (level is not None and self._doubtful(step, level.beyond)):
                usual.add(value)
            if level is None:
                continue
            evidence += max(min(level.size, CAP), -CAP / 2)
            if level.beyond > BEYOND[name] and found is None:
                why = self._expected(step, level.beyond)
                found = Finding("spike", name, step, value, level.usual, level.size, step, why)
        if vitals.gradient is None:
            evidence *= 2  # the loss speaks for both
        if self.evidence == 0.0:
            self.since = step
        self.evidence = max(self.evidence + evidence - DRAIN, 0.0)
        rare = self.rarity.look(vitals.loss, step)
        if step > self.frozen:
            self.rarity.add(vitals.loss)
        if found is None and (self.evidence > ENOUGH or rare > RARE):
            level = self.signals["loss"].level(vitals.loss)
            usual_loss = None if level is None else level.usual
            size, since = (self.evidence, self.since) if self.evidence > ENOUGH else (rare, self.rarity.since)
            why = self._expected(step)
            found = Finding("spike", "loss", step, vitals.loss, usual_loss, size, since, why)
        if found is not None or step <= self.grace:
            self.evidence = self.rarity.sum = 0.0
        if found is not None and step > self.frozen + FROZEN:
            self.frozen = -1 if found.expected else step + FROZEN
        return found

    def _rate(self, vitals: Vitals, step: int) -> Finding | None:
        rate, highest = vitals.rate, self.highest
        if rate is None:
            return None
        self.highest = max(rate, highest)
        # A warm-up starts from nearly nothing; its leaps are over by then.
        if self.seen <= LEAST or highest == 0.0 or rate <= JUMP * highest:
            return None
        return Finding("rate", "rate", step, rate, highest, rate / highest, step, self._expected(step))

    def _divergence(self, loss: float, step: int) -> Finding | None:
        usual = self.signals["loss"]
        if usual.unit is None:
            return None
        self.block.append(usual.scaled(loss))
        if len(self.block) < BLOCK:
            return None
        ordered = sorted(self.block)
        self.block.clear()
        low, median, high = (ordered[BLOCK * i // 4] for i in (1, 2, 3))
        if step <= self.grace or self.best is None or median <= self.best[0]:
            self.best, self.worse = (median, high), 0
            return None
        self.worse = self.worse + 1 if low > self.best[1] and median - self.best[0] > RISE else 0
        if self.worse < BLOCKS:
            return None
        rise, before = median - self.best[0], 2 * usual.unit * math.sinh(self.best[0])
        self.best, self.worse = (median, high), 0
        since = step - BLOCKS * BLOCK + 1
        return Finding("divergence", "loss", step, loss, before, rise, since, self._expected(step))

    def doubts(self) -> bool:
        """Tell whether evidence has begun to sum up."""
        return self.evidence > 0

    def forget(self) -> None:
        """Start afresh after a way back or a change of topology; what is usual is learned anew."""
        for usual in self.signals.values():
            usual.forget()
        self.rarity.forget()
        self.evidence, self.frozen, self.best, self.worse = 0.0, -1, None, 0
        self.block.clear()

    def state_dict(self) -> Mapping[str, object]:
        """Return everything that a later finding depends on."""
        state: DetectorsState = {
            "signals": {name: usual.state_dict() for name, usual in self.signals.items()},
            "rarity": self.rarity.state_dict(),
            "evidence": [self.evidence, self.since, self.highest, self.seen, self.frozen, self.worse],
            "resting": dict(self.resting),
            "grace": [self.grace, self.why, self.excused],
            "block": list(self.block),
            "best": None if self.best is None else list(self.best),
        }
        return cast("Mapping[str, object]", state)

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on looking."""
        self._take(cast("DetectorsState", state))

    def _take(self, state: DetectorsState) -> None:
        for name, usual in self.signals.items():
            usual.load_state_dict(state["signals"][name])
        self.rarity.load_state_dict(state["rarity"])
        self.evidence, since, self.highest, *counts = state["evidence"]
        self.since, (self.seen, self.frozen, self.worse) = int(since), map(int, counts)
        self.resting = dict(state["resting"])
        grace, why, excused = state["grace"]
        self.grace, self.why, self.excused = int(grace), str(why), float(excused)
        self.block = list(state["block"])
        self.best = None if state["best"] is None else (state["best"][0], state["best"][1])


def lost(vitals: Vitals) -> str | None:
    """Name the signal that is not finite."""
    if not math.isfinite(vitals.loss):
        return "loss"
    if vitals.gradient is not None and not math.isfinite(vitals.gradient):
        return "gradient"
    return "weights" if vitals.weights is False else None
