"""The algebra of the held-out score at one consumer: what is summed up, what is left, which units are taken.

Of a pool of units only what the host's own cannot do counts: they are regressed on these, and so are the
gradients of their outgoing weights (the efficient score). Where several consumers read a unit, each has its
own sums, for what it reads may have gone through steps of its own; a unit is worth what it is to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.widths.outlets import Outlet

RIDGE = 1e-2  # of the mean diagonal: what the host's own units can do is estimated from a few hundred rows
DAMPING = 0.1  # likewise, for the direction
ROWS = 65_536  # positions the host's units are regressed on


@dataclass(slots=True)
class Sums:
    """What training examples say of a pool of units; sums over rows, so that batches and processes add up."""

    gram: Tensor  # (c + 1, c + 1) of the host's units and a constant
    cross: Tensor  # (c + 1, pool) of those with the pool
    pool: Tensor  # (pool, pool)
    own: Tensor  # (c + 1, out) gradient of the consumer's weights, flattened per unit
    new: Tensor  # (pool, out) the same for the pool's
    rows: Tensor  # 0-dim
    examples: Tensor  # 0-dim

    def tell(self, slopes: Tensor | None) -> None:
        """Put other gradients in: of the pool's weights, then of the host's; None: of nothing.

        Args:
            slopes: (pool + c + 1, out).
        """
        units = len(self.new)
        self.new = torch.zeros_like(self.new) if slopes is None else slopes[:units].float()
        self.own = torch.zeros_like(self.own) if slopes is None else slopes[units:].float()


@dataclass(frozen=True, slots=True)
class Move:
    """A direction for the weights of one consumer; the host's own take what they could do out of it."""

    new: Tensor  # (units, out · …)
    own: Tensor  # (c + 1, out · …)


def sums_of(outlet: Outlet, phi: Tensor, hidden: Tensor, gradient: Tensor, examples: int) -> Sums:
    """Sum up one pass at one consumer.

    Args:
        outlet: The consumer.
        phi: Units of the pool as it reads them, (batch, …, pool) or (batch, pool, *space).
        hidden: Units of the host as it reads them, c in place of pool.
        gradient: Gradient of each example's loss for its output, out in place of pool.
        examples: Number of examples in the pass; zero where another view of it has counted them.
    """
    hosts = outlet.with_one(hidden)  # c + 1 units, the last one always on
    new, own = outlet.slope(phi, gradient), outlet.slope(hosts, gradient)  # (pool, out · …), (c + 1, out · …)
    a, b = outlet.rows(hosts), outlet.rows(phi)  # (rows, c + 1), (rows, pool)
    if len(a) > ROWS:
        which = torch.randperm(len(a), device=a.device)[:ROWS]
        a, b = a[which], b[which]
    count = torch.tensor(float(len(a)), device=a.device)
    return Sums(a.T @ a, a.T @ b, b.T @ b, own, new, count, torch.full_like(count, examples))


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a pool does at one consumer that the host's units do not."""

    regression: Tensor  # (c + 1, pool) of the pool on the host's units
    pool: Tensor  # (pool, pool) covariance of what is left, per example
    slope: Tensor  # (pool, out · …) gradient of the outgoing weights, likewise

    def move(self, which: Tensor) -> Move:
        """Fit a direction for the weights of some units."""
        pool, slope = self.pool[which][:, which], self.slope[which]  # (units, units), (units, out · …)
        step = -solved(damped(pool, DAMPING), slope)  # (units, out · …)
        return Move(step, -(self.regression[:, which] @ step))


def leftover(sums: Sums) -> Leftover:
    """Project the host's units out of a pool."""
    gram = damped(sums.gram / sums.rows, RIDGE)  # (c + 1, c + 1)
    regression = solved(gram, sums.cross / sums.rows)  # (c + 1, pool)
    left = sums.pool / sums.rows - regression.T @ (sums.cross / sums.rows)  # (pool, pool)
    slope = (sums.new - regression.T @ sums.own) / sums.examples  # (pool, out · …)
    return Leftover(regression, left * (sums.rows / sums.examples), slope)


def added(views: Sequence[Sequence[Sums]]) -> list[Sums]:
    """Add up what several views say, consumer by consumer."""
    totals = list(views[0])
    for view in views[1:]:
        for known, part in zip(totals, view, strict=True):
            for fact in Sums.__slots__:
                getattr(known, fact).add_(getattr(part, fact))
    return totals


def plain_sums(slope: Tensor, examples: int) -> Sums:
    """Sum up a place whose units cannot be told apart: only the gradient of its outgoing weights."""
    none = slope.new_zeros(0, 0)
    one = slope.new_tensor(1.0)
    return Sums(none, none.clone(), none.clone(), none.clone(), slope.float(), one, one * examples)


def damped(matrix: Tensor, share: float) -> Tensor:
    """Add a share of the mean diagonal to the diagonal."""
    more = matrix.clone()
    more.diagonal().add_(share * matrix.diagonal().mean().clamp_min(1e-12))
    return more


def solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve for a positive definite matrix: half the work of a general one (0.9 of 1.7 s at 2,900 units)."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def greedy(left: Sequence[Tensor], slope: Sequence[Tensor], units: int, group: int) -> Tensor:
    """Pick units one after the other, each for what the ones before it leave, (units,).

    What a unit is worth is the sum over the consumers that read it, each of which has weights of its own.

    Args:
        left: Per consumer (pool, pool), covariance of what the host's units cannot do.
        slope: Per consumer (pool, out), gradient of the outgoing weights.
        units: Number of units wanted.
        group: Number of units that come together.
    """
    pool, device = len(slope[0]), slope[0].device
    if units >= pool:
        return torch.arange(pool, device=device)
    if group > 1:
        sizes = [one.diagonal().clamp_min(1e-12) for one in left]
        power = torch.stack([worth(*one) for one in zip(slope, sizes, strict=True)]).sum(0)  # (pool,)
        groups = power.view(-1, group).sum(1).topk(units // group).indices  # (units / group,)
        return (groups[:, None] * group + torch.arange(group, device=device)).flatten()
    left, slope = [one.clone() for one in left], [turned(one) for one in slope]
    floors = [1e-6 * float(one.diagonal().max().clamp_min(1e-30)) for one in left]
    free = torch.ones(pool, dtype=torch.bool, device=device)
    picked_: list[Tensor] = []
    for _ in range(units):
        sizes = [one.diagonal().clamp_min(floor) for one, floor in zip(left, floors, strict=True)]
        power = torch.stack([worth(*one) for one in zip(slope, sizes, strict=True)]).sum(0)
        best = torch.where(free, power, -torch.inf).argmax()
        picked_.append(best)
        free[best] = False
        for index, size in enumerate(sizes):
            share = left[index][:, best] / size[best]  # (pool,)
            slope[index] = slope[index] - share[:, None] * slope[index][best]
            left[index] = left[index] - share[:, None] * left[index][best]
    return torch.stack(picked_)


def turned(slope: Tensor) -> Tensor:
    """Return rows of the same lengths and angles, (pool, out) -> (pool, at most pool): more is not asked."""
    return torch.linalg.qr(slope.T, mode="r").R.T if slope.shape[1] > len(slope) else slope


def worth(slope: Tensor, size: Tensor) -> Tensor:
    """Return what each unit alone would bring at one consumer, (pool,); slope (pool, out), size (pool,)."""
    return slope.square().sum(1) / size
