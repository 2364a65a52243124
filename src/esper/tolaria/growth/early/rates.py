"""Read ahead what the user's schedulers will do to the rate, so that no unit is born when it is gone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, ReduceLROnPlateau, SequentialLR

from esper.tamiyo.early import POINTS

MOST = 20_000  # steps of a scheduler that are tried out; longer runs are read at a coarser pace
HORIZONS = ("total_steps", "T_max", "total_iters")  # what torch's schedulers call their own length


class StandIn(SGD):
    """Has the groups of a user's optimizer, and nothing to train."""

    def __init__(self, given: Optimizer) -> None:
        groups = [
            {**{k: v for k, v in g.items() if k != "params"}, "params": [nn.Parameter(torch.zeros(1))]}
            for g in given.param_groups
        ]
        super().__init__(groups, lr=1.0)
        self.defaults = {**given.defaults, **self.defaults}
        self.step = _stepped  # schedulers ask whether it was ever called
        self._opt_called = True


def _stepped(closure: object = None) -> None:
    """Do nothing."""


_stepped._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # torch's own mark, or it would warn


def forecast(schedulers: Sequence[object], optimizer: Optimizer, steps: int, done: int) -> list[float] | None:
    """Return the learning rate of every step of a run, or None where it cannot be known.

    Of a long run it is that at ``POINTS`` steps at most, which lie evenly in it.

    Args:
        schedulers: The user's.
        optimizer: Whose first group is read.
        steps: Of the run.
        done: Steps so far; a scheduler that moved more seldom moves by the epoch.
    """
    known = [s for s in schedulers if isinstance(s, LRScheduler)]
    if any(isinstance(s, ReduceLROnPlateau) for s in schedulers) or len(known) < len(schedulers):
        return None
    known = [s for s in known if shares_groups(s.optimizer, optimizer)]
    if not known:
        return None if is_moved(optimizer) else [1.0] * min(steps, POINTS)
    stand_in = StandIn(optimizer)
    try:
        twins = [copy.deepcopy(s, {id(s.optimizer): stand_in}) for s in known]
    except (TypeError, RuntimeError, AttributeError, copy.Error):  # it holds what cannot be copied
        return None
    paces = [pace(s, steps, done) for s in known]
    every = max((one for one in paces if one is not None), default=1)
    if None in paces or steps / every > MOST:
        return None
    return tried(twins, stand_in, every, steps, done)


def tried(
    schedulers: Sequence[LRScheduler], optimizer: Optimizer, every: int, steps: int, done: int
) -> list[float]:
    """Move schedulers on to the end of a run; returns the rate at each of its points.

    Args:
        schedulers: Copies, which are moved.
        optimizer: Theirs.
        every: Steps between two of their moves.
        steps: Of the run.
        done: Steps so far; what was before has the rate of now.
    """
    points, made = min(steps, POINTS), done // every
    rates: list[float] = []
    try:
        for point in range(points):
            due = max(point * steps // points, done) // every
            while made < due:
                made += 1
                for one in schedulers:
                    one.step()
            rates.append(float(optimizer.param_groups[0]["lr"]))
    except ValueError:  # OneCycleLR is over
        rates += [float(optimizer.param_groups[0]["lr"])] * (points - len(rates))
    return rates


def is_moved(optimizer: Optimizer) -> bool:
    """Tell whether a scheduler of torch's was ever made for an optimizer."""
    return "initial_lr" in optimizer.param_groups[0]


def shares_groups(one: Optimizer, other: Optimizer) -> bool:
    """Tell an optimizer from any but itself, and what wraps it or is wrapped by it."""
    return one is other or one.param_groups[0] is other.param_groups[0]


def pace(scheduler: LRScheduler, steps: int, done: int) -> int | None:
    """Return the optimizer steps between two moves of a scheduler: seen, or guessed from its own length.

    One that has not moved after two steps moves by the epoch; without a length of its own nobody knows
    how long that is until it does.
    """
    moved, length = moves(scheduler), length_of(scheduler)
    if moved > 0 and done > 0:
        return max(round(done / moved), 1)
    if length and 2 * length <= steps:
        return max(round(steps / length), 1)
    return 1 if done < 2 else None


def moves(scheduler: object) -> int:
    """Return how often a scheduler has moved; a chain keeps no count, its members do."""
    if hasattr(scheduler, "last_epoch"):
        return int(scheduler.last_epoch)
    return max((moves(one) for one in getattr(scheduler, "_schedulers", ())), default=0)


def length_of(scheduler: object) -> int:
    """Return the moves that a scheduler was made for, 0 where it says nothing of them.

    A sequence takes its last milestone and what follows it; of a chain the longest member counts.
    """
    inner = getattr(scheduler, "_schedulers", ())
    if isinstance(scheduler, SequentialLR):
        return int(scheduler._milestones[-1]) + length_of(inner[-1])  # type: ignore[attr-defined]
    own = [int(getattr(scheduler, name)) for name in HORIZONS if hasattr(scheduler, name)]
    own += [max(scheduler.milestones)] if isinstance(scheduler, MultiStepLR) and scheduler.milestones else []
    return max([*own, *map(length_of, inner)], default=0)
