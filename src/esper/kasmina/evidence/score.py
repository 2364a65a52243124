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

import numpy as np
import torch
from torch import Tensor, nn

from esper.blueprints.kernel import LiveKernel
from esper.contracts import HealthReport
from esper.distributed.collectives import ALONE, Peers
from esper.kasmina.depth.stack import DepthKernel
from esper.kasmina.evidence.efficient import Move, Sums, added, greedy, leftover, plain_sums, sums_of
from esper.kasmina.evidence.inlaid import Columns, Inlay, Steps
from esper.kasmina.evidence.sight import Run, Sight, by_example, dead, judged, judging, passes
from esper.kasmina.widths.places import Place
from esper.kasmina.widths.widen import HostKernel, Widenable
from esper.surgery.isolation.contexts import same_randomness, untouched

POOL = 4  # units drawn per unit wanted, while they are few
LEAST = 64  # units drawn at least: one new unit is the best of so many
LARGE = 256  # units above which none are drawn beyond those wanted, and none are compared with each other


@dataclass(slots=True)
class Scored:
    """What was found at one place."""

    report: HealthReport
    kernel: LiveKernel  # the units picked, outgoing weights at zero
    direction: dict[str, Tensor]  # for the outgoing weights of a block, by name; empty where there are moves
    moves: tuple[Move, ...] = ()  # one per consumer
    values: np.ndarray = field(default_factory=lambda: np.empty(0), repr=False)
    """(examples or blocks,) held-out first-order decrease of the loss"""

    @property
    def gain(self) -> float | None:
        """Mean held-out decrease that a step along the direction promises: half of the first order.

        None where the direction has no length of its own: a block's is a gradient's.
        """
        return 0.5 * float(self.values.mean()) if len(self.values) and self.moves else None


class Score:
    """Scores all places of a model.

    Args:
        model: The host.
        places: Places to look at, by name.
        units: Wanted, by name.
        peers: Other processes, whose examples count too.
        inner: True where the loss takes gradients inside itself, so that units must run in the passes.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, Place],
        units: Mapping[str, int],
        peers: Peers = ALONE,
        inner: bool = False,
    ) -> None:
        self.model, self.places, self.units, self.peers = model, dict(places), dict(units), peers
        self.inner = inner
        self.pools: dict[str, LiveKernel] = {}
        self.sums: dict[str, list[Sums]] = {}  # one per consumer
        self.chosen: dict[str, Scored] = {}
        self.found: dict[str, list[Tensor]] = {}  # held-out values so far
        self.seen: dict[str, dict[str, float]] = {}
        self.failed: dict[str, str] = {}  # places where the units do not run, and what was raised
        self.flops = 0  # beyond the host's own passes

    def fit(self, runs: Sequence[Run], seed: int) -> None:
        """Look at training examples.

        Args:
            runs: Passes to mean losses, each with its number of examples.
            seed: Seed of the pools.
        """
        self.draw(seed)
        with self.reading(seed):
            self.learn_from(runs)
            self.settle(list(self.sums))

    def draw(self, seed: int) -> None:
        """Draw the pools."""
        with same_randomness(seed):
            for name, place in self.places.items():
                self.pools[name] = place.kernel(pool_size(place, self.units[name]))
                if isinstance(self.pools[name], DepthKernel):
                    judged(self.pools[name])

    @contextmanager
    def reading(self, seed: int) -> Iterator[None]:
        """Run passes forth and back that leave no trace."""
        with judging(self.model), untouched(self.model, seed), torch.enable_grad():
            yield

    def learn_from(self, runs: Sequence[Run]) -> None:
        """Add passes over training examples to the sums of all places."""
        if self.inner and not self.sums:
            for pool in host_kernels(self.pools).values():
                spread(pool)
        for sights, examples in passes(self.model, self.places, runs, self.columns):
            for name in sights:
                with self.alone(name):
                    self.learn(name, sights[name], examples)
            sights.clear()

    def settle(self, names: Sequence[str]) -> None:
        """Pick units and their directions, once all training examples have been seen."""
        for name in [one for one in names if one not in self.failed]:
            with self.alone(name):
                self.choose(name)
                del self.sums[name]  # as large as the weights, and told all they had to tell

    def columns(self) -> dict[str, Inlay]:
        """Inlay the pools' columns where the gradients of the outputs do not tell all."""
        if not self.inner:
            return {}
        return {name: Columns(pool) for name, pool in host_kernels(self.pools).items()}

    def steps(self) -> dict[str, Inlay]:
        """Inlay steps along the directions that were found, likewise."""
        if not self.inner:
            return {}
        kernels = host_kernels({name: one.kernel for name, one in self.chosen.items() if one.moves})
        return {name: Steps(kernel, self.chosen[name].moves) for name, kernel in kernels.items()}

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

    def learn(self, name: str, sights: Sequence[Sight], examples: int) -> None:
        """Add one pass to a place's sums: those of its views, which are of the same examples."""
        kernel, parts = self.pools[name], list[list[Sums]]()
        for sight in sights:
            new = 0 if parts else examples
            if isinstance(kernel, HostKernel) and sight.exits[0].hidden is not None:
                parts.append(self.sums_at(name, kernel, sight, examples, new))
            else:
                parts.append([self.slopes_at(kernel, sight, examples, new)])
        found = added(parts)
        for sums, slopes in zip(found, sights[0].back, strict=False):  # nothing where nothing is inlaid
            sums.tell(None if slopes is None else slopes * examples)
        if isinstance(kernel, HostKernel) and len(found[0].gram):
            self.charge(name, kernel.units, examples, found)
        else:
            self.flops += 3 * self.units[name] * self.places[name].site.unit_flops * examples
        self.sums[name] = added([self.sums[name], found]) if name in self.sums else found

    def slopes_at(self, kernel: LiveKernel, sight: Sight, examples: int, new: int) -> Sums:
        """Sum up the gradient of a block's outgoing weights in one view."""
        gradient = sight.exits[0].gradient
        assert sight.x is not None and gradient is not None
        if isinstance(kernel, DepthKernel) and sight.given is not None:
            kernel.given = sight.given
        outgoing = [kernel.get_parameter(n) for n in kernel.outgoing]
        slopes = torch.autograd.grad((kernel(sight.x) * gradient * examples).sum(), outgoing)
        return plain_sums(torch.cat([slope.flatten() for slope in slopes]), new)  # (outgoing weights,)

    def sums_at(
        self, name: str, kernel: HostKernel[Widenable], sight: Sight, examples: int, new: int
    ) -> list[Sums]:
        """Sum up one view of new units, consumer by consumer.

        Args:
            name: Name of the place.
            kernel: The pool.
            sight: The view.
            examples: Number of examples in the pass.
            new: Number of those that no other view of it has counted.
        """
        hidden = sight.exits[0].hidden
        assert sight.x is not None and hidden is not None
        if name not in self.seen:
            self.seen[name] = activity(hidden, sight, kernel.place.outlets[0].axis(hidden))
            if not self.inner:
                spread(kernel)
        with torch.no_grad():
            phis = kernel.hiddens(sight.x)  # per consumer (batch, …, pool) or (batch, pool, *space)
        parts: list[Sums] = []
        for outlet, phi, seen in zip(kernel.place.outlets, phis, sight.exits, strict=True):
            assert seen.hidden is not None and seen.gradient is not None
            parts.append(sums_of(outlet, phi, seen.hidden, seen.gradient * examples, new))
        return parts

    def charge(self, name: str, units: int, examples: int, parts: Sequence[Sums]) -> None:
        """Count what a look at one place costs.

        The pool goes through the producer once and through the consumers forth and back, the host's units
        through the consumers forth and back; then the regressions. What is inlaid in a pass goes forth and
        back with the gradients inside it.
        """
        own, often = len(parts[0].gram), 3 if self.inner else 1
        self.flops += int((1.5 * units + own) * often * self.places[name].site.unit_flops * examples)
        for part in parts:
            rows = int(part.rows)
            self.flops += 2 * rows * (own * own + own * units + units * units) + own * own * (own + 2 * units)

    def choose(self, name: str) -> None:
        """Pick units and fit the direction of their outgoing weights."""
        pool, parts, units = self.pools[name], self.sums[name], self.units[name]
        self.peers.all_reduce_mean([getattr(sums, fact) for sums in parts for fact in Sums.__slots__])
        report = HealthReport(
            self.places[name].site.name,
            None,
            int(parts[0].examples * self.peers.world),
            **self.seen.get(name, {}),
        )
        if not isinstance(pool, HostKernel) or not len(parts[0].gram):
            self.chosen[name] = Scored(report, pool, downhill(pool, parts[0]))
            return
        left = [leftover(sums) for sums in parts]
        which = greedy(
            [one.pool for one in left], [one.slope for one in left], units, self.places[name].site.granularity
        )
        kernel = pool if len(which) == len(left[0].slope) else picked(self.places[name], pool, which)
        self.chosen[name] = Scored(report, kernel, {}, tuple(one.move(which) for one in left))

    def test(self, runs: Sequence[Run], alone: bool, seed: int, shared: bool = True) -> None:
        """Look at held-out examples.

        Args:
            runs: Passes to mean losses, each with its number of examples.
            alone: True where each example is evidence of its own; else a pass is.
            seed: Seed of random numbers in the passes.
            shared: True where every process looks at the same examples; else all of theirs count.
        """
        with self.reading(seed):
            self.weigh(runs, alone)
        self.conclude(shared)

    def weigh(self, runs: Sequence[Run], alone: bool) -> None:
        """Take down what passes over held-out examples say of each direction."""
        for sights, examples in passes(self.model, self.places, runs, self.steps):
            for name in self.chosen.keys() & sights.keys():
                with self.alone(name):
                    values = self.values(name, sights[name], examples)
                    self.found.setdefault(name, []).append(values if alone else values.mean(0, keepdim=True))
            sights.clear()

    def conclude(self, shared: bool = True) -> None:
        """Give every place its held-out values, once all examples have been seen."""
        for name in self.chosen:
            if (parts := self.found.get(name)) and name not in self.failed:
                own = torch.cat(parts)  # (values of this process,)
                joined = (own if shared else self.peers.all_gather_rows(own)).double().cpu().numpy()
                heard = (
                    self.peers.broadcast_bytes(joined.tobytes()) if self.peers.world > 1 else joined.tobytes()
                )
                self.chosen[name].values = np.frombuffer(heard, dtype=np.float64)

    def values(self, name: str, sights: Sequence[Sight], examples: int) -> Tensor:
        """Return the first-order decrease of each example's loss, (examples,): the sum over its views.

        Where the rows of one view belong to no example, as those of a boundary of its own size do, the pass
        is one value, (1,).
        """
        self.flops += 2 * self.units[name] * self.places[name].site.unit_flops * examples
        found = [one for sight in sights for one in self.values_at(name, sight, examples)]
        if len({len(one) for one in found}) > 1:
            found = [one.mean(0, keepdim=True) for one in found]  # (1,) each
        return torch.stack(found).sum(0) if len(found) > 1 else found[0]

    def values_at(self, name: str, sight: Sight, examples: int) -> list[Tensor]:
        """Return what one view says of each example, consumer by consumer."""
        if sight.back:
            zero = torch.zeros(examples, device=sight.exits[0].made.device)
            return [zero if g is None else per_example(-g.float() * examples, examples) for g in sight.back]
        scored = self.chosen[name]
        kernel, moves = scored.kernel, scored.moves
        assert sight.x is not None
        if isinstance(kernel, DepthKernel) and sight.given is not None:
            kernel.given = sight.given
        moved, found = list[Tensor](), list[Tensor]()
        with torch.no_grad():
            if isinstance(kernel, HostKernel) and moves:
                read = zip(kernel.hiddens(sight.x), sight.exits, strict=True)
                for outlet, move, (phi, seen) in zip(kernel.place.outlets, moves, read, strict=True):
                    assert seen.hidden is not None
                    own = outlet.through(outlet.with_one(seen.hidden), move.own)
                    # (batch, …, out) or (batch, out, *space)
                    moved.append(outlet.through(phi, move.new) + own)
            else:
                moved.append(moved_along(kernel, sight.x, scored.direction))
            for one, seen in zip(moved, sight.exits, strict=True):
                assert seen.gradient is not None
                found.append(per_example(-(one * seen.gradient).float() * examples, examples))
        return found


def host_kernels(kernels: Mapping[str, LiveKernel]) -> dict[str, HostKernel[Widenable]]:
    """Return the kernels that widen the host's own layers."""
    return {name: kernel for name, kernel in kernels.items() if isinstance(kernel, HostKernel)}


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


def activity(hidden: Tensor, sight: Sight, axis: int) -> dict[str, float]:
    """Describe a host's units, which are along an axis, as the first consumer reads them."""
    flat = hidden.float()
    slopes = [float(seen.gradient.norm()) for seen in sight.exits if seen.gradient is not None]
    return {
        "activation_mean": float(flat.mean()),
        "activation_variance": float(flat.var()) if flat.numel() > 1 else 0.0,
        "dead": dead(flat, axis),
        "gradient_norm": math.hypot(*slopes),
    }


def downhill(kernel: LiveKernel, sums: Sums) -> dict[str, Tensor]:
    """Return the gradient's own direction for the outgoing weights, by name."""
    flat = sums.new / sums.examples  # (outgoing weights,)
    step = -flat / flat.norm().clamp_min(1e-12)
    direction, at = dict[str, Tensor](), 0
    for outgoing in kernel.outgoing:
        own = kernel.get_parameter(outgoing)
        direction[outgoing] = step[at : at + own.numel()].view_as(own)
        at += own.numel()
    return direction


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
    """Sum up what belongs to each example, (examples,); (1,) where no row is anybody's."""
    rows = by_example(values, examples)  # (examples, …)
    return values.sum().reshape(1) / examples if rows is None else rows.sum(1)


def picked(place: Place, pool: HostKernel[Widenable], which: Tensor) -> LiveKernel:
    """Build a kernel of some of a pool's units."""
    kernel = place.kernel(len(which))
    assert isinstance(kernel, HostKernel)
    kernel.take(pool, which)  # outgoing weights are zero in the pool, too
    return kernel
