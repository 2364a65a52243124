"""A fork: several layers read one producer's output, as the heads of a multi-task net read its trunk.

A new unit is a row of the producer, and of what stands between, and columns in every consumer; with these at
zero nothing the model says moves. Between producer and consumers is a tree of channel-wise steps: what all
consumers share comes first, and each has steps of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from esper.contracts import Site, WidenPlan
from esper.kasmina.recording.between import Step
from esper.kasmina.widths.draft import Draft
from esper.kasmina.widths.layers import affine, out_size, weight_of
from esper.kasmina.widths.outlets import Outlet, column_names
from esper.kasmina.widths.pairs import unit_parameters
from esper.kasmina.widths.widen import HostKernel


@dataclass(frozen=True)
class Stretch:
    """Steps from one parting to the next, or to a consumer."""

    source: int | None  # the stretch it goes on from; None: the producer's own output
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Branch:
    """One way out of a fork."""

    path: str  # of the consumer
    outlet: Outlet
    stretch: int  # what the consumer reads
    positions: float  # per example at which it is applied


@dataclass(frozen=True)
class Fork:
    """A site with the host's own modules at hand."""

    site: Site
    producer: nn.Module  # a layer, see layers.py
    stretches: tuple[Stretch, ...]  # each behind the one it goes on from
    branches: tuple[Branch, ...]  # in the order their consumers run
    positions: float  # per example at which the producer is applied
    step_flops: int  # forward, per example and unit, of what stands between

    @property
    def port(self) -> Literal["parallel"]:
        """New units read what the producer reads."""
        return "parallel"

    def ends(self) -> tuple[nn.Module, ...]:
        """Return the producer and every consumer."""
        return self.producer, *(branch.outlet.consumer for branch in self.branches)

    @property
    def outlets(self) -> tuple[Outlet, ...]:
        """The consumers."""
        return tuple(branch.outlet for branch in self.branches)

    def used(self) -> Mapping[str, float]:
        """Map producer and consumers to the positions at which they run."""
        return {self.site.entry: self.positions, **{b.path: b.positions for b in self.branches}}

    def steps(self) -> Iterator[tuple[str, Step]]:
        """List every step with the role its tensors have in a kernel, "between_<stretch>_<step>"."""
        for number, stretch in enumerate(self.stretches):
            for index, step in enumerate(stretch.steps):
                yield f"between_{number}_{index}", step

    def kernel(self, units: int) -> ForkKernel:
        """Build new units; every consumer's columns are zero."""
        return ForkKernel(self, units)

    def refreshed(self) -> Fork:
        """Return the fork with its layers' facts as they are now."""
        parameters = unit_parameters(self.producer) + sum(outlet.unit_weights for outlet in self.outlets)
        parameters += sum(step.unit_parameters() for _, step in self.steps())
        flops = weight_of(self.producer)[0].numel() * self.positions
        flops += sum(branch.outlet.unit_weights * branch.positions for branch in self.branches)
        costs = {"unit_parameters": parameters, "unit_flops": round(2 * flops) + self.step_flops}
        return replace(self, site=replace(self.site, width=out_size(self.producer), **costs))

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added; sources are the kernel's tensor names."""
        draft = Draft(self.site.name, units)
        draft.rows("producer", self.site.entry, self.producer)
        for role, step in self.steps():
            draft.between(role, step)
        for name, branch in zip(column_names(self.outlets), self.branches, strict=True):
            draft.columns(name, branch.path, branch.outlet.consumer, branch.outlet.columns)
        return draft.plan()


class ForkKernel(HostKernel[Fork]):
    """New units of a fork.

    Args:
        pair: Fork in which the units will live.
        units: Number of units.
    """

    producer_weight: nn.Parameter
    producer_bias: nn.Parameter | None

    def __init__(self, pair: Fork, units: int) -> None:
        super().__init__(pair, units)
        self.draw("producer", pair.producer)
        self.columns()
        stretches = enumerate(pair.stretches)
        self.owned = [self.own(f"between_{number}", one.steps) for number, one in stretches]
        self.axes = self.along()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map the producer's input to what the units add to each consumer's output."""
        read = zip(self.pair.outlets, self.outgoing, self.hiddens(x), strict=True)
        return tuple(affine(outlet.consumer, h, getattr(self, name), None) for outlet, name, h in read)

    def hiddens(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what each consumer reads of the units."""
        first = affine(self.pair.producer, x, self.producer_weight, self.producer_bias)
        made: list[Tensor] = []
        for number, (stretch, owned) in enumerate(zip(self.pair.stretches, self.owned, strict=True)):
            h = first if stretch.source is None else made[stretch.source]
            if stretch.source is not None and stretch.steps:
                h = h.clone()  # a step may write over what it reads, and others read this
            made.append(self.through(f"between_{number}", stretch.steps, owned, h))
        return tuple(made[branch.stretch] for branch in self.pair.branches)
