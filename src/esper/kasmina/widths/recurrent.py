"""The hidden size of a recurrent layer: new units are a recurrent layer of their own beside the old ones.

At birth the weights between old and new units are zero both ways, so the old units do as before and a kernel
is just a small layer over the same input; behind it the consumer's columns are zero. Once the units are part
of the layer every weight learns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts import Site, WidenEdit, WidenPlan
from esper.kasmina.recording.between import Step
from esper.kasmina.widths.draft import Draft, edit
from esper.kasmina.widths.layers import affine, weight_of
from esper.kasmina.widths.pairs import TwoEnded
from esper.kasmina.widths.widen import HostKernel

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}


@dataclass(frozen=True)
class RecurrentPair(TwoEnded):
    """A site with the host's own modules at hand; a unit is one in every layer and direction."""

    site: Site
    producer: nn.RNNBase  # nn.LSTM, nn.GRU or nn.RNN
    consumer: nn.Module
    part: int  # what is read of it: 0 the outputs, 1 the last states, 2 the last cells
    steps: tuple[Step, ...]
    columns: int  # consumer columns per unit: 2 behind both directions
    places: tuple[int, int]  # positions per example
    step_flops: int

    @property
    def gates(self) -> int:
        """Parts of every weight: 4 in an LSTM, 3 in a GRU."""
        return GATES[self.producer.mode]

    @property
    def directions(self) -> int:
        """1, or 2."""
        return 2 if self.producer.bidirectional else 1

    def used(self) -> Mapping[str, int]:
        """Map both layers to the positions at which they run."""
        return {self.site.entry: self.places[0], self.site.exit: self.places[1]}

    def kernel(self, units: int) -> RecurrentKernel:
        """Build new units; the consumer's columns are zero."""
        return RecurrentKernel(self, units)

    def names(self) -> Iterator[tuple[int, str, str]]:
        """List (layer, name within it, full name) of every weight."""
        for name in self.producer._flat_weights_names:  # "weight_ih_l0_reverse"
            role, _, rest = name.rpartition("_l")
            yield int(rest.partition("_")[0]), role, name

    def refreshed(self) -> RecurrentPair:
        """Return the pair with its layers' facts as they are now.

        Every unit reads every other, so units cost more the more there are. What is told is the mean where
        the size doubles, which is also the most that may be added at a time: no budget is overrun.
        """
        width, outgoing = self.producer.hidden_size, weight_of(self.consumer)[:, : self.columns].numel()
        matrices, biases = (
            (b - a) // width for a, b in zip(self.size(width), self.size(2 * width), strict=True)
        )
        parameters = matrices + biases + outgoing + sum(step.unit_parameters() for step in self.steps)
        flops = 2 * (matrices * self.places[0] + outgoing * self.places[1]) + self.step_flops
        costs = {"unit_parameters": parameters, "unit_flops": flops}
        return replace(self, site=replace(self.site, width=width, most=width, **costs))

    def size(self, hidden: int) -> tuple[int, int]:
        """Count the numbers in matrices and biases at a hidden size."""
        layer, each = self.producer, self.directions * self.gates * hidden
        inputs = layer.input_size + (layer.num_layers - 1) * self.directions * hidden
        return each * (inputs + layer.num_layers * hidden), each * 2 * layer.num_layers * bool(layer.bias)

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added; sources are the kernel's tensor names."""
        draft = Draft(self.site.name, units)
        entry, gates = self.site.entry, self.gates
        for layer, role, name in self.names():
            host, path = getattr(self.producer, name), f"{entry}.{name}"
            draft.edits.append(edit(path, 0, host, gates * units, name, gates))
            if role == "weight_hh":
                draft.edits.append(edit(path, 1, host, units, name))
            elif role == "weight_ih" and layer > 0:
                draft.edits.append(edit(path, 1, host, self.directions * units, name, self.directions))
        draft.attributes.append((entry, "hidden_size", self.producer.hidden_size + units))
        draft.steps("between", self.steps)
        draft.columns("consumer_weight", self.site.exit, self.consumer, self.columns, self.columns)
        return draft.plan()


class RecurrentKernel(HostKernel[RecurrentPair]):
    """New units of a recurrent layer, written out, so that they run under vmap.

    Args:
        pair: Pair in which the units will live.
        units: Number of units, in each layer and direction.
    """

    def __init__(self, pair: RecurrentPair, units: int) -> None:
        super().__init__(pair, units)
        bound = 1 / math.sqrt(pair.producer.hidden_size)
        like: Tensor = getattr(pair.producer, pair.producer._flat_weights_names[0])  # (gates * hidden, in)
        for layer, role, name in pair.names():
            inner = pair.directions * units if role == "weight_ih" and layer else units
            inner = pair.producer.input_size if role == "weight_ih" and not layer else inner
            shape = (units, pair.gates, inner)[: 3 if role.startswith("weight") else 2]
            self.register_parameter(name, nn.Parameter(like.new_empty(shape).uniform_(-bound, bound)))
        self.columns()
        self.owned = self.own("between", pair.steps)
        own = {name for layer, role, name in pair.names() if role == "weight_hh" or (layer and "ih" in role)}
        self.axes = {name: axis for name, axis in self.along().items() if name not in own or "bias" in name}

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        """Map what the layer reads to what the units add to the consumer's output, or to its input."""
        pair = self.pair
        like = self.consumer_weight.dtype
        if x.dtype != like and not torch.is_autocast_enabled(x.device.type):
            x = x.to(like)
        h = self.run(x.transpose(0, 1) if pair.producer.batch_first else x)[pair.part]
        if pair.part == 0:
            if pair.columns > 1:  # (…, directions * units) -> (…, units * directions): a unit's columns meet
                h = h.unflatten(-1, (pair.columns, self.units)).transpose(-2, -1).flatten(-2)
            h = h.transpose(0, 1) if pair.producer.batch_first else h
        h = self.through("between", pair.steps, self.owned, h)
        return h if hidden else affine(pair.consumer, h, self.consumer_weight, None)

    def run(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run all layers over (time, batch, in); returns outputs, last states and last cells."""
        layer, ends = self.pair.producer, list[tuple[Tensor, Tensor]]()
        for number in range(layer.num_layers):
            if number:
                x = F.dropout(x, layer.dropout, layer.training)
            made = [self.scan(x, f"_l{number}{back}", bool(back)) for back in ("", "_reverse")[: self.ways]]
            x = torch.cat([states for states, _, _ in made], -1)  # (time, batch, directions * units)
            ends += [(state, cell) for _, state, cell in made]
        return x, torch.stack([state for state, _ in ends]), torch.stack([cell for _, cell in ends])

    @property
    def ways(self) -> int:
        """1, or 2 directions."""
        return self.pair.directions

    def scan(self, x: Tensor, suffix: str, back: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Run one layer in one direction; returns every state, the last one and the last cell."""
        # (time, batch, gates, units)
        given = F.linear(x, *self.gated("ih", suffix)).unflatten(-1, (self.pair.gates, self.units))
        weight, bias = self.gated("hh", suffix)
        h = cell = given.new_zeros(given.shape[1], self.units)  # (batch, units)
        states: list[Tensor] = []
        for g in reversed(given.unbind()) if back else given.unbind():
            recurrent = F.linear(h, weight, bias).unflatten(-1, (self.pair.gates, self.units))
            h, cell = step(self.pair.producer.mode, g, recurrent, h, cell)
            states.append(h)
        return torch.stack(states[::-1] if back else states), h, cell  # (time, batch, units)

    def gated(self, which: str, suffix: str) -> tuple[Tensor, Tensor | None]:
        """Return a weight and its bias with the gates in front, as torch has them."""
        weight, bias = (getattr(self, f"{kind}_{which}{suffix}", None) for kind in ("weight", "bias"))
        assert isinstance(weight, Tensor)
        # (units, gates, in) -> (gates * units, in), (units, gates) -> (gates * units,)
        return weight.transpose(0, 1).flatten(0, 1), None if bias is None else bias.T.flatten()

    def taken(self, name: str, tensor: Tensor, units: int, which: Tensor) -> Tensor:
        """Pick units; weights between units are picked on both sides."""
        if name in self.axes:
            return super().taken(name, tensor, units, which)
        columns = torch.cat([which + units * way for way in range(tensor.shape[-1] // units)])
        return tensor[which][..., columns]

    def lay(self, edit: WidenEdit, tensor: Tensor) -> Tensor:
        """Put gates, or directions, in front of units; between old and new units there are zeros."""
        if edit.source == "consumer_weight":
            # (out, units * chunks) -> (out, chunks * units)
            tensor = tensor.unflatten(1, (self.units, edit.chunks)).transpose(1, 2).flatten(1, 2)
        if edit.source == "consumer_weight" or edit.source.startswith("between"):
            return super().lay(edit, tensor)
        rows = tensor.transpose(0, 1)  # (gates, units, …)
        host = getattr(self.pair.producer, edit.source)
        if edit.axis == 1:
            old = tensor.new_zeros(self.pair.gates, host.shape[0] // self.pair.gates, tensor.shape[-1])
            return torch.cat([old, rows], 1).flatten(0, 1)  # (gates * (old + units), …)
        if edit.source in self.axes:
            return rows.flatten(0, 1)
        return tensor.new_zeros(self.pair.gates * self.units, host.shape[1])


def step(mode: str, g: Tensor, r: Tensor, h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Advance by one position; g and r (batch, gates, units) come from the input and from the last state."""
    if mode == "LSTM":
        i, f, c, o = (g + r).unbind(-2)
        cell = f.sigmoid() * cell + i.sigmoid() * c.tanh()
        return o.sigmoid() * cell.tanh(), cell
    if mode == "GRU":
        reset, keep = (g[..., :2, :] + r[..., :2, :]).sigmoid().unbind(-2)
        new = (g[..., 2, :] + reset * r[..., 2, :]).tanh()
        return new + keep * (h - new), cell
    h = (g + r).squeeze(-2)
    return h.tanh() if mode == "RNN_TANH" else h.relu(), cell
