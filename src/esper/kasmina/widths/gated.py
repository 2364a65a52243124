"""A gated pair: two producers read one input, their outputs meet in a product, one consumer reads it.

``down(act(gate(x)) * up(x))`` (GLU, SwiGLU: Shazeer, arXiv:2002.05202). A new unit is a row in both producers
and a column in the consumer; with that column at zero the output does not move.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from esper.contracts import Site, WidenPlan
from esper.kasmina.recording.between import Step
from esper.kasmina.widths.draft import Draft
from esper.kasmina.widths.layers import (
    affine,
    out_size,
    weight_of,
)
from esper.kasmina.widths.pairs import TwoEnded, unit_parameters
from esper.kasmina.widths.widen import HostKernel


@dataclass(frozen=True)
class GatedPair(TwoEnded):
    """A site with the host's own modules at hand."""

    site: Site
    producer: nn.Module  # nn.Linear or a convolution, the one that runs first
    partner: nn.Module  # the other factor's
    partner_name: str
    consumer: nn.Module
    left: tuple[Step, ...]  # between the producer and the product
    right: tuple[Step, ...]  # between the partner and the product
    steps: tuple[Step, ...]  # between the product and the consumer
    columns: int
    places: tuple[float, float]  # positions per example at which producers and consumer are applied
    step_flops: int

    def used(self) -> Mapping[str, float]:
        """Map all three layers to the positions at which they run."""
        before, behind = self.places
        return {self.site.entry: before, self.partner_name: before, self.site.exit: behind}

    def kernel(self, units: int) -> GatedKernel:
        """Build new units; the consumer's columns are zero."""
        return GatedKernel(self, units)

    def refreshed(self) -> GatedPair:
        """Return the pair with its layers' facts as they are now."""
        outgoing = weight_of(self.consumer)[:, : self.columns].numel()
        incoming = weight_of(self.producer)[0].numel() + weight_of(self.partner)[0].numel()
        parameters = unit_parameters(self.producer) + unit_parameters(self.partner) + outgoing
        parameters += sum(step.unit_parameters() for step in (*self.left, *self.right, *self.steps))
        flops = round(2 * (incoming * self.places[0] + outgoing * self.places[1])) + self.step_flops
        site = replace(self.site, width=out_size(self.producer), unit_parameters=parameters, unit_flops=flops)
        return replace(self, site=site)

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added; sources are the kernel's tensor names."""
        draft = Draft(self.site.name, units)
        draft.rows("producer", self.site.entry, self.producer)
        draft.rows("partner", self.partner_name, self.partner)
        for role, steps in (("left", self.left), ("right", self.right), ("between", self.steps)):
            draft.steps(role, steps)
        draft.columns("consumer_weight", self.site.exit, self.consumer, self.columns)
        return draft.plan()


class GatedKernel(HostKernel[GatedPair]):
    """New units of a gated pair.

    Args:
        pair: Pair in which the units will live.
        units: Number of units.
    """

    producer_weight: nn.Parameter
    producer_bias: nn.Parameter | None
    partner_weight: nn.Parameter
    partner_bias: nn.Parameter | None

    def __init__(self, pair: GatedPair, units: int) -> None:
        super().__init__(pair, units)
        self.draw("producer", pair.producer)
        self.draw("partner", pair.partner)
        self.columns()
        self.owned = {
            "left": self.own("left", pair.left),
            "right": self.own("right", pair.right),
            "between": self.own("between", pair.steps),
        }
        self.axes = self.along()

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        """Map the producers' input to what the units add to the consumer's output, or to its input."""
        pair = self.pair
        left = affine(pair.producer, x, self.producer_weight, self.producer_bias)
        right = affine(pair.partner, x, self.partner_weight, self.partner_bias)
        left = self.through("left", pair.left, self.owned["left"], left)
        right = self.through("right", pair.right, self.owned["right"], right)
        # (batch, …, units) or (batch, units, *space)
        h = self.through("between", pair.steps, self.owned["between"], left * right)
        return h if hidden else affine(pair.consumer, h, self.consumer_weight, None)
