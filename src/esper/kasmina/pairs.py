"""A pair: a producing and a consuming layer with only channel-wise operations between."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from esper.contracts import Site, WidenEdit, WidenPlan
from esper.kasmina.between import Step
from esper.kasmina.widen import WidenKernel


@dataclass(frozen=True)
class Pair:
    """A site with the host's own modules at hand."""

    site: Site
    producer: Any  # nn.Linear or a convolution
    consumer: Any
    steps: tuple[Step, ...]
    columns: int  # consumer columns per unit: 1, or positions per channel behind a flatten
    places: tuple[int, int]  # positions per example at which producer and consumer are applied
    step_flops: int  # forward, per example and unit, of what stands between
    fast: tuple[Any, ...] = ()  # modules around whose fast path would pass the layers by in evaluation

    @property
    def port(self) -> Literal["parallel"]:
        """New units read what the producer reads."""
        return "parallel"

    def ends(self) -> tuple[nn.Module, nn.Module]:
        """Return producer and consumer."""
        return self.producer, self.consumer

    def kernel(self, units: int) -> WidenKernel:
        """Build new units; the consumer's columns are zero."""
        return WidenKernel(self, units)

    def refreshed(self) -> Pair:
        """Return the pair with its layers' facts as they are now, after this or a neighbour was widened."""
        outgoing = weight_of(self.consumer)[:, : self.columns].numel()
        parameters = unit_parameters(self.producer) + outgoing
        parameters += sum(step.unit_parameters() for step in self.steps)
        incoming = weight_of(self.producer)[0].numel() * self.places[0]
        flops = 2 * (incoming + outgoing * self.places[1]) + self.step_flops
        site = replace(self.site, width=out_size(self.producer), unit_parameters=parameters, unit_flops=flops)
        return replace(self, site=site)

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added; sources are the kernel's tensor names."""
        entry, exit_ = self.site.entry, self.site.exit
        edits = [edit(f"{entry}.weight", 0, self.producer.weight, units, "producer_weight")]
        attributes = [(entry, out_name(self.producer), out_size(self.producer) + units)]
        if self.producer.bias is not None:
            edits.append(edit(f"{entry}.bias", 0, self.producer.bias, units, "producer_bias"))
        for index, step in enumerate(self.steps):
            for own, host in step.grows():
                edits.append(edit(host, 0, step.tensors()[own], units, f"between_{index}_{own}"))
            attributes.extend(step.attributes(units))
        added = units * self.columns
        edits.append(edit(f"{exit_}.weight", 1, self.consumer.weight, added, "consumer_weight"))
        attributes.append((exit_, in_name(self.consumer), in_size(self.consumer) + added))
        return WidenPlan(self.site.name, units, tuple(edits), tuple(attributes))


def edit(name: str, axis: int, tensor: Any, added: int, source: str, chunks: int = 1) -> WidenEdit:
    """Describe one tensor's growth."""
    return WidenEdit(name, axis, tensor.shape[axis], tensor.shape[axis] + added, source, chunks)


def out_name(layer: nn.Module) -> str:
    """Name the attribute that counts outputs."""
    return "out_features" if isinstance(layer, nn.Linear) else "out_channels"


def in_name(layer: nn.Module) -> str:
    """Name the attribute that counts inputs."""
    return "in_features" if isinstance(layer, nn.Linear) else "in_channels"


def out_size(layer: nn.Module) -> int:
    """Count outputs."""
    return int(getattr(layer, out_name(layer)))


def in_size(layer: nn.Module) -> int:
    """Count inputs."""
    return int(getattr(layer, in_name(layer)))


def weight_of(layer: nn.Module) -> Tensor:
    """Return a layer's weight, (out, in, …)."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def unit_parameters(producer: nn.Module) -> int:
    """Count what one more row of a producer holds, its bias included."""
    return weight_of(producer)[0].numel() + (producer.bias is not None)
