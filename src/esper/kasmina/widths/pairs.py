"""A pair: a producing and a consuming layer with only channel-wise operations between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import nn

from esper.contracts import Site, WidenPlan
from esper.kasmina.recording.between import Step
from esper.kasmina.widths.draft import Draft
from esper.kasmina.widths.layers import out_size, weight_of
from esper.kasmina.widths.outlets import Outlet
from esper.kasmina.widths.widen import WidenKernel


class Layers(Protocol):
    """The layers of a pair."""

    @property
    def producer(self) -> nn.Module:
        """The layer whose input is read."""

    @property
    def consumer(self) -> nn.Module:
        """The layer that gets columns."""

    @property
    def columns(self) -> int:
        """The consumer's columns per unit."""


class TwoEnded:
    """What pairs have in common: one layer whose input is read, one that gets columns."""

    @property
    def port(self) -> Literal["parallel"]:
        """New units read what the producer reads."""
        return "parallel"

    def ends(self: Layers) -> tuple[nn.Module, nn.Module]:
        """Return producer and consumer."""
        return self.producer, self.consumer

    @property
    def outlets(self: Layers) -> tuple[Outlet, ...]:
        """The consumer."""
        return (Outlet(self.consumer, self.columns),)


@dataclass(frozen=True)
class Pair(TwoEnded):
    """A site with the host's own modules at hand."""

    site: Site
    producer: nn.Module  # a layer, see layers.py
    consumer: nn.Module
    steps: tuple[Step, ...]
    columns: int  # consumer columns per unit: 1, or positions per channel behind a flatten
    places: tuple[float, float]  # positions per example at which producer and consumer are applied
    step_flops: int  # forward, per example and unit, of what stands between
    fast: tuple[nn.Module, ...] = ()  # modules around whose fast path would pass the layers by in evaluation

    def used(self) -> Mapping[str, float]:
        """Map producer and consumer to the positions at which they run."""
        return {self.site.entry: self.places[0], self.site.exit: self.places[1]}

    def kernel(self, units: int) -> WidenKernel:
        """Build new units; the consumer's columns are zero."""
        return WidenKernel(self, units)

    def refreshed(self) -> Pair:
        """Return the pair with its layers' facts as they are now, after this or a neighbour was widened."""
        outgoing = weight_of(self.consumer)[:, : self.columns].numel()
        parameters = unit_parameters(self.producer) + outgoing
        parameters += sum(step.unit_parameters() for step in self.steps)
        incoming = weight_of(self.producer)[0].numel() * self.places[0]
        flops = round(2 * (incoming + outgoing * self.places[1])) + self.step_flops
        site = replace(self.site, width=out_size(self.producer), unit_parameters=parameters, unit_flops=flops)
        return replace(self, site=site)

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added; sources are the kernel's tensor names."""
        draft = Draft(self.site.name, units)
        draft.rows("producer", self.site.entry, self.producer)
        draft.steps("between", self.steps)
        draft.columns("consumer_weight", self.site.exit, self.consumer, self.columns)
        return draft.plan()


def unit_parameters(producer: nn.Module) -> int:
    """Count what one more row of a producer holds, its bias included."""
    return weight_of(producer)[0].numel() + (producer.bias is not None)
