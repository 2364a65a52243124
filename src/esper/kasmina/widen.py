"""``widen(k)``: the one kernel built from the site itself: producer slice → between → consumer slice.

While it is judged it is a branch beside the pair; when it is kept its tensors become rows and columns of the
user's own layers, so the grown model has no extra launch (measured: an MLP step 207 µs widened to 32, 606 µs
with three branches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from esper.blueprints.kernel import LiveKernel
from esper.contracts import Site, WidenPlan
from esper.kasmina.between import Step


class TwoLayers(Protocol):
    """What the kernel reads of a pair."""

    @property
    def site(self) -> Site:
        """The plain facts."""

    @property
    def producer(self) -> Any:
        """The layer that gets rows."""

    @property
    def consumer(self) -> Any:
        """The layer that gets columns."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """What stands between."""

    @property
    def columns(self) -> int:
        """Consumer columns per unit."""

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added."""


class WidenKernel(LiveKernel):
    """New units of a pair; the consumer's new columns start at zero, so the output does not move at birth.

    Args:
        pair: Where the units will live; its modules are used, not owned.
        units: How many.
    """

    outgoing = ("consumer_weight",)

    def __init__(self, pair: TwoLayers, units: int) -> None:
        super().__init__()
        self.units = units
        self.pair = pair
        producer, consumer = pair.producer.weight, pair.consumer.weight
        bound = 1 / math.sqrt(producer[0].numel())  # torch's default for Linear and convolutions
        rows = producer.new_empty(units, *producer.shape[1:]).uniform_(-bound, bound)
        self.producer_weight = nn.Parameter(rows)  # (units, in, *taps)
        self.producer_bias = None if pair.producer.bias is None else nn.Parameter(producer.new_zeros(units))
        columns = consumer.new_zeros(consumer.shape[0], units * pair.columns, *consumer.shape[2:])
        self.consumer_weight = nn.Parameter(columns)  # (out, units * columns, *taps)
        self.owned: list[list[str]] = []  # of each step
        for index, step in enumerate(pair.steps):
            fresh = step.fresh(units, producer.detach())
            self.owned.append(list(fresh))
            for own, tensor in fresh.items():
                name = f"between_{index}_{own}"
                if own.startswith("running_"):
                    self.register_buffer(name, tensor)
                else:
                    self.register_parameter(name, nn.Parameter(tensor))
        held = [name for name, _ in [*self.named_parameters(), *self.named_buffers()]]
        self.axes: Mapping[str, int] = {name: int(name == "consumer_weight") for name in held}

    @property
    def place(self) -> TwoLayers:
        """The pair, under the name every kernel of the host's own layers has for it."""
        return self.pair

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep the host's modules out of the kernel's own tree."""
        if name == "pair":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        """Map the producer's input to what the units add to the consumer's output, or to its input."""
        h = affine(self.pair.producer, x, self.producer_weight, self.producer_bias)
        for index, (step, names) in enumerate(zip(self.pair.steps, self.owned, strict=True)):
            h = step.run(
                h,
                {own: getattr(self, f"between_{index}_{own}") for own in names},
                self.pair.producer.training,
            )
        return h if hidden else affine(self.pair.consumer, h, self.consumer_weight, None)

    def plan(self) -> WidenPlan:
        """Say what of the host grows when this kernel is kept."""
        return self.pair.plan(self.units)

    def slices(self, plan: WidenPlan) -> dict[str, Tensor]:
        """Return the new part of every tensor the plan names."""
        return {edit.name: getattr(self, edit.source).detach() for edit in plan.edits}


def affine(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply other weights in a layer's own way: its stride, dilation, padding and padding mode."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)
