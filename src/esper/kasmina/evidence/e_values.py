"""Held-out evidence: is the loss lower with the kernel than without it, beyond what chance explains?

Differences are paired: same weights, same examples, eval mode. They feed an e-value, a bet against "the
kernel does not help" whose expected wealth is at most 1 when that is true (Waudby-Smith & Ramdas, JRSS-B
2024). Gains are capped, which can only lose the bet; losses are not, for rare large ones undo frequent
small gains. The p-value of the mean must agree (`significance.py`): it knows that neighbours may be alike,
the bet does not. The run's false-keep budget is shared evenly by its looks (union bound), so looking often
is paid for.
"""

from __future__ import annotations

import math

import numpy as np

from esper.kasmina.evidence.significance import p_value

STAKES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)  # half the wealth is spread over these
CAP = 6.0  # what a gain counts at most, in root-mean-square differences of the rehearsal
# A stake of 1 risks all on a loss of so many root mean squares, or so many times the worst rehearsed.
WORST, WORSE = 2.0, 1.5


def e_value(differences: np.ndarray, rehearsal: np.ndarray) -> float:
    """Return the wealth won by betting that the mean of ``differences`` is positive.

    Args:
        differences: (examples,) loss without minus loss with the kernel; held out.
        rehearsal: The same on training examples. Cap and stakes of the bets come from here, so they are fixed
            before the first held-out example is seen; that is what keeps the bet fair.

    Returns:
        A number that exceeds 1/p with probability at most p when the mean is not positive, as long as no loss
        is larger than the stakes allow for: those that one has ruined win nothing any more, but that a probe
        shows none of the losses that it might, nobody can know. 0 where nothing is known.
    """
    scale = float(np.sqrt(np.mean(np.square(rehearsal)))) if len(rehearsal) else 0.0
    if (
        not (scale > 0 and math.isfinite(scale))
        or len(differences) == 0
        or not np.isfinite(differences).all()
    ):
        return 0.0
    most, risk = CAP * scale, max(WORST * scale, -WORSE * float(rehearsal.min()))
    practice = np.minimum(rehearsal, most) / risk
    kelly = float(np.clip(practice.mean() / np.square(practice).mean(), STAKES[0], STAKES[-1]))
    stakes = np.array([kelly, *STAKES])
    factors = 1.0 + stakes[:, None] * (np.minimum(differences, most) / risk)  # (stakes, examples)
    with np.errstate(divide="ignore"):
        wealth = np.log(np.maximum(factors, 0.0)).sum(axis=1)
    top = float(wealth.max())
    if top == -math.inf:
        return 0.0
    shares = np.array([0.5] + [0.5 / len(STAKES)] * len(STAKES))
    return math.exp(min(top, 700.0)) * float((shares * np.exp(wealth - top)).sum())


def weight_of_evidence(differences: np.ndarray, rehearsal: np.ndarray, blocks: bool = False) -> float:
    """Return the wealth of the bet, and no more than 1/p of the mean: both must say that the loss is lower.

    Args:
        differences: See :func:`e_value`.
        rehearsal: See :func:`e_value`.
        blocks: True where each of them is of a block of examples. Otherwise neighbours may be alike, which
            the bet takes for more evidence than it is (rows repeated eight times: 11 budgets of false keeps).
    """
    p = p_value(differences, blocks=len(differences) if blocks else None)
    return 0.0 if p is None else min(e_value(differences, rehearsal), 1.0 / p)
