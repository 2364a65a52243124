"""A pair: a producing and a consuming layer with only channel-wise operations between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from esper.contracts import Site, WidenEdit, WidenPlan
from esper.kasmina.between import Step
from esper.kasmina.layers import grown_inputs, grown_outputs, in_axis, out_axis, out_size, weight_of
from esper.kasmina.outlets import Outlet
from esper.kasmina.widen import WidenKernel


@dataclass(frozen=True)
class Pair:
    """A site with the host's own modules at hand."""

    site: Site
    producer: Any  # a layer, see layers.py
    consumer: Any
    steps: tuple[Step, ...]
    columns: int  # consumer columns per unit: 1, or positions per channel behind a flatten
    places: tuple[float, float]  # positions per example at which producer and consumer are applied
    step_flops: int  # forward, per example and unit, of what stands between
    fast: tuple[Any, ...] = ()  # modules around whose fast path would pass the layers by in evaluation

    @property
    def port(self) -> Literal["parallel"]:
        """New units read what the producer reads."""
        return "parallel"

    def ends(self) -> tuple[nn.Module, nn.Module]:
        """Return producer and consumer."""
        return self.producer, self.consumer

    @property
    def outlets(self) -> tuple[Outlet, ...]:
        """The consumer."""
        return (Outlet(self.consumer, self.columns),)

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
        site = replace(
            self.site, width=out_size(self.producer), unit_parameters=parameters, unit_flops=round(flops)
        )
        return replace(self, site=site)

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added; sources are the kernel's tensor names."""
        entry, exit_ = self.site.entry, self.site.exit
        weight = f"{entry}.weight"
        edits = [edit(weight, out_axis(self.producer), self.producer.weight, units, "producer_weight")]
        attributes = grown_outputs(entry, self.producer, units)
        if self.producer.bias is not None:
            edits.append(edit(f"{entry}.bias", 0, self.producer.bias, units, "producer_bias"))
        for index, step in enumerate(self.steps):
            for own, host in step.grows():
                edits.append(edit(host, 0, step.tensors()[own], units, f"between_{index}_{own}"))
            attributes.extend(step.attributes(units))
        added = units * self.columns
        axis = in_axis(self.consumer)
        edits.append(edit(f"{exit_}.weight", axis, self.consumer.weight, added, "consumer_weight"))
        attributes += grown_inputs(exit_, self.consumer, added)
        return WidenPlan(self.site.name, units, tuple(edits), tuple(attributes))


def edit(name: str, axis: int, tensor: Any, added: int, source: str, chunks: int = 1) -> WidenEdit:
    """Describe one tensor's growth."""
    return WidenEdit(name, axis, tensor.shape[axis], tensor.shape[axis] + added, source, chunks)


def unit_parameters(producer: nn.Module) -> int:
    """Count what one more row of a producer holds, its bias included."""
    return weight_of(producer)[0].numel() + (producer.bias is not None)
