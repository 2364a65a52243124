"""The held-out score: would new units lower the loss of examples nobody has learned from?

For every place at once, in one pass forth and back over training examples and one over held-out ones. Per
place a pool of random units is drawn. What the host's own consumer can already do with the units it has is
projected out of them (the efficient score), the units that promise most are picked one after the other, and
a direction for their outgoing weights is fitted. On a held-out example the score is the first-order decrease
of its loss along that direction: on noise its mean is zero or less, whatever the training examples said.

Cross-entropy is read at tempered logits (output layer × 0.3): a saturated host gives almost no gradient, and
its plain score falls from 8 to 2 while the tempered one stays at 8 to 19 (digits CNN).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esper.blueprints.kernel import LiveKernel
from esper.contracts import HealthReport
from esper.kasmina.health import dead
from esper.kasmina.isolation import same_randomness, untouched
from esper.kasmina.layers import affine, is_linear, weight_of
from esper.kasmina.peers import ALONE, Peers
from esper.kasmina.places import Place
from esper.kasmina.sight import Run, Sight, judged, judging, passes
from esper.kasmina.stack import DepthKernel
from esper.kasmina.widen import HostKernel

RIDGE = 1e-2  # of the mean diagonal: what the host's own units can do is estimated from a few hundred rows
DAMPING = 0.1  # likewise, for the direction
POOL = 4  # units drawn per unit wanted, while they are few
LEAST = 64  # units drawn at least: one new unit is the best of so many
LARGE = 256  # units above which none are drawn beyond those wanted, and none are compared with each other
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


@dataclass(slots=True)
class Scored:
    """What was found at one place."""

    report: HealthReport
    kernel: LiveKernel  # the units picked, outgoing weights at zero
    direction: dict[str, Tensor]  # for the outgoing weights
    values: np.ndarray = field(repr=False)  # (examples or blocks,) held-out first-order decrease of the loss

    @property
    def gain(self) -> float | None:
        """Mean held-out decrease that a step along the direction promises: half of the first order.

        None where the direction has no length of its own: a block's is a gradient's.
        """
        return 0.5 * float(self.values.mean()) if len(self.values) and "new" in self.direction else None


class Score:
    """Scores all places of a model.

    Args:
        model: The host.
        places: By name.
        units: Wanted, by name.
        peers: Other processes, whose examples count too.
    """

    def __init__(
        self, model: nn.Module, places: Mapping[str, Place], units: Mapping[str, int], peers: Peers = ALONE
    ) -> None:
        self.model, self.places, self.units, self.peers = model, dict(places), dict(units), peers
        self.pools: dict[str, LiveKernel] = {}
        self.sums: dict[str, Sums] = {}
        self.chosen: dict[str, Scored] = {}
        self.seen: dict[str, dict[str, float]] = {}
        self.failed: dict[str, str] = {}  # places where the units do not run, and what was raised
        self.flops = 0  # beyond the host's own passes

    def fit(self, runs: Sequence[Run], seed: int) -> None:
        """Look at training examples.

        Args:
            runs: Passes to mean losses, each with its number of examples.
            seed: Of the pools.
        """
        with same_randomness(seed):
            for name, place in self.places.items():
                self.pools[name] = place.kernel(pool_size(place, self.units[name]))
                if isinstance(self.pools[name], DepthKernel):
                    judged(self.pools[name])
        with judging(self.model), untouched(self.model, seed), torch.enable_grad():
            for sights, examples in passes(self.model, self.places, runs):
                for name, sight in sights.items():
                    with self.alone(name):
                        self.learn(name, sight, examples)
            for name in [n for n in self.sums if n not in self.failed]:
                with self.alone(name):
                    self.choose(name)

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Let units that do not run close no other place: a kernel repeats a layer's class, not its call.

        Where several processes look, all of them must look at the same places, and it is raised.
        """
        try:
            yield
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            if self.peers.world > 1:
                raise
            self.failed[name] = f"{type(error).__name__}: {error}"

    def learn(self, name: str, sight: Sight, examples: int) -> None:
        """Add one pass to a place's sums."""
        kernel = self.pools[name]
        assert sight.x is not None and sight.gradient is not None
        gradient = sight.gradient * examples  # per example
        if name not in self.seen and sight.hidden is not None and isinstance(kernel, HostKernel):
            flat = sight.hidden.float()
            self.seen[name] = {
                "activation_mean": float(flat.mean()),
                "activation_variance": float(flat.var()),
                "dead": dead(flat),
                "gradient_norm": float(sight.gradient.norm()),
            }
        if isinstance(kernel, DepthKernel) and sight.given is not None:
            kernel.given = sight.given
        if not isinstance(kernel, HostKernel) or sight.hidden is None:
            outgoing = [kernel.get_parameter(n) for n in kernel.outgoing]
            slopes = torch.autograd.grad((kernel(sight.x) * gradient).sum(), outgoing)
            self.flops += 3 * self.units[name] * self.places[name].site.unit_flops * examples
            flat = torch.cat([slope.flatten() for slope in slopes])
            self.add(name, plain_sums(flat, examples))
            return
        if name not in self.sums:
            spread(kernel)
        with torch.no_grad():
            phi = kernel(sight.x, hidden=True)
        hosts = with_one(sight.hidden, kernel)
        new, own = outgoing_gradient(kernel, phi, gradient), outgoing_gradient(kernel, hosts, gradient)
        a, b = rows_of(hosts, kernel), rows_of(phi, kernel)
        if len(a) > ROWS:
            which = torch.randperm(len(a), device=a.device)[:ROWS]
            a, b = a[which], b[which]
        count = torch.tensor(float(len(a)), device=a.device)
        self.charge(name, kernel.units, examples, a.shape[1], len(a))
        self.add(name, Sums(a.T @ a, a.T @ b, b.T @ b, own, new, count, torch.full_like(count, examples)))

    def charge(self, name: str, units: int, examples: int, own: int, rows: int) -> None:
        """Count what a look at one place costs.

        The pool goes through the producer once and through the consumer forth and back, the host's units
        through the consumer forth and back; then the regressions.
        """
        site = self.places[name].site
        self.flops += int((1.5 * units + own) * site.unit_flops * examples)
        self.flops += 2 * rows * (own * own + own * units + units * units) + own * own * (own + 2 * units)

    def add(self, name: str, part: Sums) -> None:
        """Add up."""
        known = self.sums.get(name)
        if known is None:
            self.sums[name] = part
            return
        for fact in Sums.__slots__:
            getattr(known, fact).add_(getattr(part, fact))

    def choose(self, name: str) -> None:
        """Pick units and fit the direction of their outgoing weights."""
        pool, sums, units = self.pools[name], self.sums[name], self.units[name]
        self.peers.mean([getattr(sums, fact) for fact in Sums.__slots__])
        report = HealthReport(
            self.places[name].site.name,
            None,
            int(sums.examples * self.peers.world),
            **self.seen.get(name, {}),
        )
        if not isinstance(pool, HostKernel) or not len(sums.gram):
            flat = sums.new / sums.examples
            step = -flat / flat.norm().clamp_min(1e-12)
            direction, at = dict[str, Tensor](), 0
            for outgoing in pool.outgoing:
                own = pool.get_parameter(outgoing)
                direction[outgoing] = step[at : at + own.numel()].view_as(own)
                at += own.numel()
            self.chosen[name] = Scored(report, pool, direction, np.empty(0))
            return
        gram = damped(sums.gram / sums.rows, RIDGE)
        regression = solved(gram, sums.cross / sums.rows)  # (c + 1, pool)
        left = sums.pool / sums.rows - regression.T @ (sums.cross / sums.rows)  # (pool, pool), residual
        slope = (sums.new - regression.T @ sums.own) / sums.examples  # (pool, out)
        which = greedy(left, slope, units, self.places[name].site.granularity)
        kernel = pool if len(which) == len(slope) else picked(self.places[name], pool, which)
        per_example = sums.rows / sums.examples
        step = -solved(damped(left[which][:, which] * per_example, DAMPING), slope[which])
        flat = {"new": step, "own": -(regression[:, which] @ step)}  # (units, out), (c + 1, out)
        self.chosen[name] = Scored(report, kernel, flat, np.empty(0))

    def test(self, runs: Sequence[Run], alone: bool, seed: int, shared: bool = True) -> None:
        """Look at held-out examples.

        Args:
            runs: Passes to mean losses, each with its number of examples.
            alone: Whether each example is evidence of its own; else a pass is.
            seed: Of random numbers in the passes.
            shared: Whether every process looks at the same examples; else all of theirs count.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in self.chosen}
        with judging(self.model), untouched(self.model, seed), torch.enable_grad():
            for sights, examples in passes(self.model, self.places, runs):
                for name in found.keys() & sights.keys():
                    with self.alone(name):
                        values = self.values(name, sights[name], examples)
                        found[name].append(values if alone else values.mean(0, keepdim=True))
        for name, parts in found.items():
            if parts and name not in self.failed:
                own = torch.cat(parts)
                joined = (own if shared else self.peers.gather(own)).double().cpu().numpy()
                heard = self.peers.hear(joined.tobytes()) if self.peers.world > 1 else joined.tobytes()
                self.chosen[name].values = np.frombuffer(heard, dtype=np.float64)

    def values(self, name: str, sight: Sight, examples: int) -> Tensor:
        """Return the first-order decrease of each example's loss, (examples,)."""
        scored = self.chosen[name]
        kernel, direction = scored.kernel, scored.direction
        assert sight.x is not None and sight.gradient is not None
        if isinstance(kernel, DepthKernel) and sight.given is not None:
            kernel.given = sight.given
        with torch.no_grad():
            if isinstance(kernel, HostKernel) and "new" in direction:
                phi = kernel(sight.x, hidden=True)
                moved = through(kernel, phi, direction["new"])
                assert sight.hidden is not None
                moved = moved + through(kernel, with_one(sight.hidden, kernel), direction["own"])
            else:
                moved = moved_along(kernel, sight.x, direction)
            self.flops += 2 * self.units[name] * self.places[name].site.unit_flops * examples
            product = -(moved * sight.gradient).float() * examples
        return per_example(product, examples)


def pool_size(place: Place, units: int) -> int:
    """Return how many units to draw: whole groups, several for each that is wanted while they are few."""
    kernel = place.kernel(units)
    if units >= LARGE or any(name not in kernel.axes for name, _ in kernel.named_parameters()):
        return units  # a recurrent unit is bound to the others
    group = place.site.granularity
    return max(min(max(POOL * units, LEAST), LARGE) // group * group, units)


def spread(kernel: LiveKernel) -> None:
    """Spread the units' thresholds over what they read, as torch's own start does with its biases."""
    for name, parameter in kernel.named_parameters():
        if name.endswith("_bias") and not name.startswith(("between", "left", "right")):
            weight = kernel.get_parameter(name.removesuffix("_bias") + "_weight")
            bound = 1 / math.sqrt(weight[0].numel())
            with torch.no_grad():
                parameter.uniform_(-bound, bound)


def with_one(hidden: Tensor, kernel: HostKernel[Any]) -> Tensor:
    """Append a unit that is always on to what the consumer reads."""
    columns = int(kernel.pair.columns)
    axis = hidden.dim() - 1 if is_linear(kernel.pair.consumer) else 1
    shape = list(hidden.shape)
    shape[axis] = columns
    return torch.cat([hidden, hidden.new_ones(shape)], axis)


def rows_of(hidden: Tensor, kernel: HostKernel[Any]) -> Tensor:
    """Return the units one by one, a row per position, (rows, units)."""
    columns = int(kernel.pair.columns)
    if not is_linear(kernel.pair.consumer):
        return hidden.movedim(1, -1).flatten(0, -2).float()
    if columns > 1:
        return hidden.unflatten(-1, (-1, columns)).movedim(-2, -1).flatten(0, -2).float()
    return hidden.flatten(0, -2).float()


def outgoing_gradient(kernel: HostKernel[Any], hidden: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of the outgoing weights of these units, (units, out · …)."""
    consumer, columns = kernel.pair.consumer, int(kernel.pair.columns)
    host = weight_of(consumer)
    axis = hidden.dim() - 1 if is_linear(consumer) else 1
    weight = host.new_zeros(host.shape[0], hidden.shape[axis], *host.shape[2:]).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad((affine(consumer, hidden, weight, None) * gradient).sum(), weight)
    return slope.float().movedim(1, 0).reshape(hidden.shape[axis] // columns, -1)


def through(kernel: HostKernel[Any], hidden: Tensor, weight: Tensor) -> Tensor:
    """Run the consumer with other weights, given per unit, (units, out · …)."""
    consumer, columns = kernel.pair.consumer, int(kernel.pair.columns)
    host = weight_of(consumer)
    flat = weight.reshape(-1, host.shape[0], *host.shape[2:]).movedim(0, 1)
    assert flat.shape[1] == weight.shape[0] * columns
    return affine(consumer, hidden, flat.to(host.dtype), None)


def moved_along(kernel: LiveKernel, x: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    """Return what a kernel gives when its outgoing weights move along a direction, to first order."""
    small = 1e-2
    own = {name: kernel.get_parameter(name) for name in direction}
    try:
        for name, parameter in own.items():
            parameter.copy_(small * direction[name])
        return kernel(x) / small
    finally:
        for parameter in own.values():
            parameter.zero_()


def per_example(values: Tensor, examples: int) -> Tensor:
    """Sum up what belongs to each example; axis 0 is theirs, or a multiple of it."""
    if values.dim() > 1 and values.shape[0] != examples and values.shape[1] == examples:
        values = values.transpose(0, 1)
    if values.shape[0] % examples:
        return values.sum().reshape(1) / examples
    return values.reshape(examples, -1).sum(1)


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


def greedy(left: Tensor, slope: Tensor, units: int, group: int) -> Tensor:
    """Pick units one after the other, each for what the ones before it leave, (units,).

    Args:
        left: (pool, pool) covariance of what the host's units cannot do.
        slope: (pool, out) gradient of the outgoing weights.
        units: Wanted.
        group: Units that come together.
    """
    if units >= len(slope):
        return torch.arange(len(slope), device=slope.device)
    if group > 1:
        power = (slope.square().sum(1) / left.diagonal().clamp_min(1e-12)).view(-1, group).sum(1)
        groups = power.topk(units // group).indices
        return (groups[:, None] * group + torch.arange(group, device=slope.device)).flatten()
    left, slope = left.clone(), slope.clone()
    floor = 1e-6 * float(left.diagonal().max().clamp_min(1e-30))
    free = torch.ones(len(slope), dtype=torch.bool, device=slope.device)
    picked_: list[Tensor] = []
    for _ in range(units):
        size = left.diagonal().clamp_min(floor)
        power = torch.where(free, slope.square().sum(1) / size, -torch.inf)
        best = power.argmax()
        picked_.append(best)
        free[best] = False
        share = left[:, best] / size[best]
        slope = slope - share[:, None] * slope[best]
        left = left - share[:, None] * left[best]
    return torch.stack(picked_)


def picked(place: Place, pool: HostKernel[Any], which: Tensor) -> LiveKernel:
    """Build a kernel of some of a pool's units."""
    kernel = place.kernel(len(which))
    assert isinstance(kernel, HostKernel)
    kernel.take(pool, which)  # outgoing weights are zero in the pool, too
    return kernel
