"""``widen(k)``: the one kernel built from the site itself: producer slice → between → consumer slice.

While it is judged it is a branch beside the pair; when it is kept its tensors become rows and columns of the
user's own layers, so the grown model has no extra launch (measured: an MLP step 207 µs widened to 32, 606 µs
with three branches).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from esper.blueprints.kernel import LiveKernel
from esper.contracts import Site, WidenEdit, WidenPlan
from esper.kasmina.recording.between import Step
from esper.kasmina.widths.layers import affine, weight_of
from esper.kasmina.widths.outlets import Outlet, column_names


class Widenable(Protocol):
    """What a kernel made of the host's own layers reads of its place."""

    @property
    def site(self) -> Site:
        """The plain facts."""

    @property
    def producer(self) -> nn.Module:
        """The layer whose input is read."""

    @property
    def outlets(self) -> tuple[Outlet, ...]:
        """The layers that get columns."""

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added."""


class TwoLayers(Widenable, Protocol):
    """A pair."""

    @property
    def consumer(self) -> nn.Module:
        """The one layer that gets columns."""

    @property
    def steps(self) -> tuple[Step, ...]:
        """What stands between."""


PlaceT = TypeVar("PlaceT", bound=Widenable)


class HostKernel(LiveKernel, Generic[PlaceT]):
    """New units of the host's own layers; the consumers' new columns start at zero.

    Called with inputs it gives what the units add to the consumer's output, or where there are several a
    tuple of what they add to each.

    Args:
        pair: Place where the units will live; its modules are used, not owned.
        units: Number of units.
    """

    def __init__(self, pair: PlaceT, units: int) -> None:
        super().__init__()
        self.units = units
        self.pair: PlaceT = pair  # no module: the host's stay out of the kernel's own tree
        self.outgoing = column_names(pair.outlets)
        self.consumer_weight: nn.Parameter

    @property
    def place(self) -> PlaceT:
        """The pair, under the name that every kernel of a place has for it."""
        return self.pair

    def draw(self, role: str, layer: nn.Module, each: int = 1) -> None:
        """Make rows of a producing layer: uniform with bound 1/√fan_in, torch's default, and bias 0.

        A unit may have several, which stand together.
        """
        host = weight_of(layer)
        bound = 1 / math.sqrt(host[0].numel())
        rows = host.new_empty(self.units * each, *host.shape[1:]).uniform_(-bound, bound)
        self.register_parameter(f"{role}_weight", nn.Parameter(rows))  # (units * each, in, *taps)
        # (units * each,)
        bias = None if layer.bias is None else nn.Parameter(host.new_zeros(self.units * each))
        self.register_parameter(f"{role}_bias", bias)

    def columns(self) -> None:
        """Make every consumer's columns, all zero."""
        for name, outlet in zip(self.outgoing, self.pair.outlets, strict=True):
            self.register_parameter(name, nn.Parameter(outlet.zeros(self.units)))

    def hiddens(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return what each consumer reads of the units."""
        return (self(x, hidden=True),)

    def own(self, role: str, steps: Sequence[Step]) -> list[list[str]]:
        """Make the tensors that steps need for new channels; returns their names per step."""
        owned: list[list[str]] = []
        for index, step in enumerate(steps):
            fresh = step.fresh(self.units)
            owned.append(list(fresh))
            for own, tensor in fresh.items():
                name = f"{role}_{index}_{own}"
                if own.startswith("running_"):
                    self.register_buffer(name, tensor)
                else:
                    self.register_parameter(name, nn.Parameter(tensor))
        return owned

    def along(self) -> Mapping[str, int]:
        """Name every tensor's axis with one slice per unit, once all are made."""
        held = [name for name, _ in [*self.named_parameters(), *self.named_buffers()]]
        return {name: int(name in self.outgoing) for name in held}

    def through(self, role: str, steps: Sequence[Step], owned: Sequence[Sequence[str]], h: Tensor) -> Tensor:
        """Run steps on new channels, in the mode of the host."""
        for index, (step, names) in enumerate(zip(steps, owned, strict=True)):
            tensors = {name: getattr(self, f"{role}_{index}_{name}") for name in names}
            h = step.run(h, tensors, self.pair.producer.training)
        return h

    def take(self, pool: HostKernel[PlaceT], which: Tensor) -> None:
        """Become some units of a larger kernel of the same place, in the order asked for."""
        theirs = {**dict(pool.named_parameters()), **dict(pool.named_buffers())}
        with torch.no_grad():
            for name, own in [*self.named_parameters(), *self.named_buffers()]:
                own.copy_(self.taken(name, theirs[name], pool.units, which.to(own.device)))

    def taken(self, name: str, tensor: Tensor, units: int, which: Tensor) -> Tensor:
        """Pick the slices of some units from one tensor; a unit may hold several."""
        slices = tensor.movedim(self.axes[name], 0)  # (units * slices of each, …)
        own = slices.reshape(units, -1, *slices.shape[1:])  # (units, slices of each, …)
        return own[which].flatten(0, 1).movedim(0, self.axes[name])

    def plan(self) -> WidenPlan:
        """Say what of the host grows when this kernel is kept."""
        return self.pair.plan(self.units)

    def slices(self, plan: WidenPlan) -> dict[str, Tensor]:
        """Return the new part of every tensor the plan names."""
        return {key: self.lay(edit, getattr(self, edit.source).detach()) for key, edit in plan.keyed()}

    def lay(self, edit: WidenEdit, tensor: Tensor) -> Tensor:
        """Bring a tensor of this kernel, or its optimizer's state, into the order of the host's."""
        axis = self.axes[edit.source]
        return tensor if axis == edit.axis else tensor.transpose(axis, edit.axis)


class WidenKernel(HostKernel[TwoLayers]):
    """New units of a pair.

    Args:
        pair: Pair in which the units will live.
        units: Number of units.
    """

    producer_weight: nn.Parameter
    producer_bias: nn.Parameter | None

    def __init__(self, pair: TwoLayers, units: int) -> None:
        super().__init__(pair, units)
        self.draw("producer", pair.producer)
        self.columns()
        self.owned = self.own("between", pair.steps)
        self.axes = self.along()

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        """Map the producer's input to what the units add to the consumer's output, or to its input."""
        # (batch, …, units) or (batch, units, *space)
        h = affine(self.pair.producer, x, self.producer_weight, self.producer_bias)
        h = self.through("between", self.pair.steps, self.owned, h)
        return h if hidden else affine(self.pair.consumer, h, self.consumer_weight, None)
