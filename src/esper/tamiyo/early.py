"""The early recipe's part of the decisions: when events fall, and how many units each place gets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from esper.contracts import Site
from esper.tamiyo.controller import RemainingBudget

POINTS = (
    10_000  # of a run at which its learning rate is looked at; the steps themselves where there are fewer
)
LATEST = 0.75  # of its share of the learning, in steps
HALVINGS = 12  # of the interval in which the share lies that the budget allows

Cost = Callable[
    [Mapping[str, int]], tuple[int, int]
]  # units by place -> parameters, forward FLOPs per example


def due(shares: Sequence[float], rates: Sequence[float] | None, steps: int) -> list[int]:
    """Return the steps of a run at which it has done these shares of its learning, see :func:`placed`."""
    return sorted(placed(shares, rates, steps))


def placed(shares: Sequence[float], rates: Sequence[float] | None, steps: int) -> dict[int, float]:
    """Map the steps of a run to the shares of its learning that it has done there.

    Learning is the sum of learning rates: under a cosine .07, .2, .4, .6 of it are .04, .1, .21, .33 of the
    steps. A rate that stays or rises is no reason to wait: no event comes later than three quarters of its
    share in steps (letter at a constant rate: 0.25 points below the full net then, 0.66 without; in the
    warm-up of OneCycle the loss of a digits CNN .053 instead of .060).

    Args:
        shares: Shares of the learning, each in (0, 1).
        rates: Learning rates of every step, or at points that lie evenly in the run; None is not known, and
            taken for a cosine: too early costs less than too late.
        steps: Number of optimizer steps of the run.
    """
    if rates is None:
        points = min(steps, POINTS)
        rates = [0.5 * (1 + math.cos(math.pi * (i + 0.5) / points)) for i in range(points)]
    learned = list(itertools.accumulate(rates))
    found, at = dict[int, float](), 0
    for share in sorted(shares):
        while at < len(learned) - 1 and learned[at] < share * learned[-1]:
            at += 1
        there = at + 1 if len(rates) == steps else round((at + 1) * steps / len(rates))
        found[max(min(there, round(LATEST * share * steps)), 1)] = share
    return found if learned[-1] > 0 else {}


def wanted(site: Site, factor: float) -> int:
    """Return the units that multiply a site's width, in whole groups; at least one group."""
    group = site.granularity
    units = max(round(site.width * (factor - 1) / group), 1) * group
    return units if site.most is None else min(units, site.most)


def allocate(
    sites: Sequence[Site], most: float, left: int, room: RemainingBudget, cost: Cost
) -> dict[str, int]:
    """Share out what the budget allows, the same factor for every place and for every event to come.

    Args:
        sites: Places that may grow.
        most: Largest factor by which an event may multiply a width.
        left: Number of events to come, this one included: together they spend the budget, or as much of it as
            they can.
        room: Rest of the budget.
        cost: Function of units by site to their cost together: two layers that both double have four times
            the weights between them.
    """

    def grown(factor: float) -> dict[str, int]:
        return {s.name: wanted(s, factor) for s in sites}

    def part(share: float) -> dict[str, int]:
        whole = {
            s.name: int(n * share / s.granularity) * s.granularity for s, n in zip(sites, first, strict=True)
        }
        return {name: count for name, count in whole.items() if count > 0}

    def fits(units: Mapping[str, int]) -> bool:
        parameters, flops = cost(units)
        return parameters <= room.parameters and (room.model_flops is None or flops <= room.model_flops)

    factor = most
    if not fits(grown(most**left)):
        factor = bisect(1.0, most, lambda f: fits(grown(f**left)))
    first = list(grown(factor).values())
    if fits(part(1.0)):
        return part(1.0)
    found = part(bisect(0.0, 1.0, lambda share: fits(part(share))))
    if found or len(sites) < 2:
        return found
    # one group of the dearest place is more than there is: the others share the room without it
    dearest = max(sites, key=lambda s: cost({s.name: s.granularity}))
    return allocate([s for s in sites if s is not dearest], most, left, room, cost)


def bisect(low: float, high: float, holds: Callable[[float], bool]) -> float:
    """Return the largest number found between two for which something holds that holds for small ones."""
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
