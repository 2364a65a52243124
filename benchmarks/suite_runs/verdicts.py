"""What the runs of one part say: quality differences with their intervals, and cost ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.intervals import Paired, mean_of, paired_difference
from benchmarks.suite_runs.files import Record
from benchmarks.suite_runs.training import Run

POINTS, SHARE = 0.003, 0.01  # "not worse": the lower end is at least −0.3 points, or the upper +1 % loss
Call = Literal["win", "tie", "loss", "unclear"]


@dataclass(frozen=True)
class Verdict:
    """How much better the first arm is, in shares of 1 for accuracy, of the other's mean for a loss."""

    gain: Paired
    tolerance: float

    @property
    def not_worse(self) -> bool:
        return self.gain.low is not None and self.gain.low >= -self.tolerance

    @property
    def worse(self) -> bool:
        """Say whether the whole interval lies below zero, or nothing finite was measured."""
        return math.isnan(self.gain.mean) or (self.gain.high is not None and self.gain.high < 0)

    @property
    def call(self) -> Call:
        """Win: the whole interval is above zero. Tie: not worse. Loss: all below. Else too wide to say."""
        if self.gain.low is not None and self.gain.low > 0:
            return "win"
        if self.not_worse:
            return "tie"
        return "loss" if self.worse else "unclear"

    def show(self) -> str:
        return f"{self.call} {self.gain.show()}"


def quality(record: Record, arm: str, other: str) -> Verdict | None:
    """Compare two arms in the task's metric, seed by seed; None where one of them was not measured."""
    if arm not in record.runs or other not in record.runs:
        return None
    return compared(record, record.runs[arm], record.runs[other])


def compared(record: Record, a: Sequence[Run], b: Sequence[Run]) -> Verdict:
    pairs = matched(a, b)
    scores = [[run.test for run in side] for side in zip(*pairs, strict=True)]
    if record.task.metric == "accuracy":
        return Verdict(paired_difference(*scores), POINTS)
    return relative(scores[0], scores[1], record.task.floor)


def losses(record: Record, arm: str, other: str) -> Verdict | None:
    """Compare two arms in the test loss, whatever the metric is."""
    if arm not in record.runs or other not in record.runs:
        return None
    pairs = matched(record.runs[arm], record.runs[other])
    scores = [[run.test_loss for run in side] for side in zip(*pairs, strict=True)]
    return relative(scores[0], scores[1], record.task.floor)


def relative(a: Sequence[float], b: Sequence[float], floor: float) -> Verdict:
    """Compare losses as shares of the second's mean, or of ``floor`` where that is larger."""
    scale = max(mean_of(b).mean, floor)
    return Verdict(paired_difference([loss / scale for loss in b], [loss / scale for loss in a]), SHARE)


def matched(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Pair the runs of the same seeds; a seed that one arm could not run is left out.

    Raises:
        ValueError: No seed is common to both.
    """
    known = {run.seed: run for run in b}
    pairs = [(run, known[run.seed]) for run in a if run.seed in known]
    if not pairs:
        raise ValueError("paired runs need the same seeds, and these have none in common")
    return pairs


def ratio(record: Record, figure: str, other: str = "full") -> float | None:
    """Divide grown's mean of a cost by another arm's."""
    if "grown" not in record.runs or other not in record.runs:
        return None
    pairs = matched(record.runs["grown"], record.runs[other])
    sides = [mean_of([getattr(run, figure) for run in side]).mean for side in zip(*pairs, strict=True)]
    return sides[0] / sides[1]


def best_of_ladder(record: Record) -> str | None:
    """Return the size a user of the ladder would keep: the best mean probe metric."""
    sign = 1 if record.task.higher_is_better else -1
    scores = {arm: sign * mean_of([run.probe for run in runs]).mean for arm, runs in record.ladder.items()}
    known = {arm: score for arm, score in scores.items() if not math.isnan(score)}
    return max(known, key=lambda arm: known[arm]) if known else None


def ladder_ratio(record: Record) -> float | None:
    """Divide grown's FLOPs by those of training every size in full, which is the cost of choosing one."""
    if "grown" not in record.runs or len(record.ladder) < len(record.task.sizes):
        return None
    cost = sum(mean_of([run.flops for run in runs]).mean for runs in record.ladder.values())
    return mean_of([run.flops for run in record.runs["grown"]]).mean / cost


def geometric_mean(values: Sequence[float | None]) -> float | None:
    """Average ratios; None where one of them was not measured, or there is none."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return math.exp(sum(math.log(value) for value in known) / len(known))
