"""Held-out evidence: is the loss lower with the kernel than without it, beyond what chance explains?

Per-example differences are paired: same weights, same examples, eval mode. They feed an e-value, a bet
against "the kernel does not help" whose expected wealth is at most 1 when that is true (Waudby-Smith &
Ramdas, JRSS-B 2024). The bet clips, so that one wild example cannot win; the mean of clipped differences is
not the loss, so the p-value of the mean must agree (`significance.py`). The run's false-keep budget is shared
evenly by its looks (union bound), so looking often is paid for.
"""

from __future__ import annotations

import math

import numpy as np

from esper.kasmina.evidence.significance import p_value

STAKES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)  # half the wealth is spread over these
BOUND = (
    2.0  # clipping, in root-mean-square differences on the rehearsal; 3 won 10 % less per example (digits)
)


def e_value(differences: np.ndarray, rehearsal: np.ndarray) -> float:
    """Return the wealth won by betting that the mean of ``differences`` is positive.

    Args:
        differences: (examples,) loss without minus loss with the kernel; held out.
        rehearsal: The same on training examples. Scale and stake of the bets come from here, so they are
            fixed before the first held-out example is seen; that is what keeps the bet fair.

    Returns:
        A number that exceeds 1/p with probability at most p when the clipped mean is not positive; 0 where
        nothing is known.
    """
    bound = BOUND * float(np.sqrt(np.mean(np.square(rehearsal)))) if len(rehearsal) else 0.0
    if (
        not (bound > 0 and math.isfinite(bound))
        or len(differences) == 0
        or not np.isfinite(differences).all()
    ):
        return 0.0
    practice = np.clip(rehearsal / bound, -1.0, 1.0)
    kelly = float(np.clip(practice.mean() / np.square(practice).mean(), STAKES[0], STAKES[-1]))
    bets = np.clip(differences / bound, -1.0, 1.0)
    wealth = np.array([np.log1p(stake * bets).sum() for stake in (kelly, *STAKES)])
    shares = np.array([0.5] + [0.5 / len(STAKES)] * len(STAKES))
    top = float(wealth.max())
    return math.exp(min(top, 700.0)) * float((shares * np.exp(wealth - top)).sum())


def weight_of_evidence(differences: np.ndarray, rehearsal: np.ndarray) -> float:
    """Return the wealth of the bet, and no more than 1/p of the mean: both must say that the loss is lower.

    Where rare large losses undo frequent small gains, clipping hides them from the bet: it alone kept 0.29 of
    kernels that harm, where 0.05 was promised. How far the p-value can be trusted: `esper bench evidence`.
    """
    p = p_value(differences)
    return 0.0 if p is None else min(e_value(differences, rehearsal), 1.0 / p)
