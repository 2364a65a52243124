"""What a bandit is told of an arm: a row of numbers, each of the order of 1, 0 where nothing is known."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esper.contracts import HealthReport, Site

NAMES = (
    "prior",
    "pair",  # a hidden layer that widens; else a blueprint beside a layer
    "depth",  # of the place among all, -1 first, 1 last
    "width",  # log2, 0 at 32 units, 1 at 1,024
    "cost",  # log2 of a unit's parameters to the median's
    "gradient",  # log2 of the gradient's norm there to the median's
    "dead",  # share of units that are 0 on every example
    "budget",  # share of the parameters to come that is left
    "stalled",  # share of the plateau window the loss has stood still for
    "share",  # log2 of the width to the even one
    "directed",  # the start follows the measured gradient: all, half or none of the candidates
)
DIRECTED = {"svd": 1.0, "mixed": 0.5, "random": 0.0}


@dataclass(frozen=True, slots=True)
class Moment:
    """What every arm of one decision shares."""

    budget_left: float  # share of the parameters to come
    stalled: float  # of the plateau window


def described(
    sites: Sequence[Site], reports: Mapping[str, HealthReport], moment: Moment
) -> dict[str, tuple[float, ...]]:
    """Return what is known of each place, in the order of NAMES without what an arm adds."""
    typical = median([site.unit_parameters for site in sites])
    steep = median([r.gradient_norm for r in reports.values() if r.gradient_norm])
    last = max(len(sites) - 1, 1)
    rows = dict[str, tuple[float, ...]]()
    for at, site in enumerate(sites):
        report = reports.get(site.name)
        gradient = None if report is None else report.gradient_norm
        dead = None if report is None else report.dead
        rows[site.name] = (
            float(site.kind == "pair"),
            2 * at / last - 1,
            times(site.width, 32) / 5,
            times(site.unit_parameters, typical),
            times(gradient, steep),
            dead or 0.0,
            moment.budget_left,
            moment.stalled,
        )
    return rows


def started(start: str) -> tuple[float, ...]:
    """Return what an arm's start adds."""
    return (DIRECTED[start],)


def median(values: Sequence[float]) -> float | None:
    """Return the median, or None of nothing."""
    return statistics.median(values) if values else None


def times(value: float | None, typical: float | None) -> float:
    """Return log2 of a ratio within ±4; 0 where it is not known."""
    if not value or not typical or not math.isfinite(value / typical):
        return 0.0
    return min(max(math.log2(value / typical), -4.0), 4.0)
