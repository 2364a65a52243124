"""An outlet: a layer that reads a place's units, seen as a map from units to its output.

A pair has one, a fork several. The score asks each of them what its columns would do; where it asks per unit,
a unit behind a flatten has several columns, which stand together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.kasmina.widths.layers import affine, is_linear, weight_of


@dataclass(frozen=True)
class Outlet:
    """A consumer, and how many of its columns belong to one unit."""

    consumer: nn.Module  # a layer, see layers.py
    columns: int  # 1, or positions per channel behind a flatten

    def zeros(self, units: int) -> Tensor:
        """Make columns for new units, all zero, (out, units * columns, *taps)."""
        host = weight_of(self.consumer)
        return host.new_zeros(host.shape[0], units * self.columns, *host.shape[2:])

    @property
    def unit_weights(self) -> int:
        """Count the weights that one unit has here."""
        return weight_of(self.consumer)[:, : self.columns].numel()

    def with_one(self, hidden: Tensor) -> Tensor:
        """Append a unit that is always on to what the consumer reads."""
        axis = self.axis(hidden)
        shape = list(hidden.shape)
        shape[axis] = self.columns
        return torch.cat([hidden, hidden.new_ones(shape)], axis)  # units * columns + columns along the axis

    def rows(self, hidden: Tensor) -> Tensor:
        """Return the units one by one, a row per position, (rows, units)."""
        if not is_linear(self.consumer):
            return hidden.movedim(1, -1).flatten(0, -2).float()  # (batch, units, *space) -> (rows, units)
        if self.columns > 1:  # (batch, …, units * columns) -> (rows, units)
            return hidden.unflatten(-1, (-1, self.columns)).movedim(-2, -1).flatten(0, -2).float()
        return hidden.flatten(0, -2).float()

    def slope(self, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient of the outgoing weights of these units, (units, out · …).

        Args:
            hidden: Units as the consumer reads them, (batch, …, units) or (batch, units, *space).
            gradient: Gradient of the loss for its output, (batch, …, out) or (batch, out, *space).
        """
        host, axis = weight_of(self.consumer), self.axis(hidden)
        # (out, units * columns, *taps)
        weight = host.new_zeros(host.shape[0], hidden.shape[axis], *host.shape[2:]).requires_grad_()
        with torch.enable_grad():
            said = (affine(self.consumer, hidden, weight, None) * gradient).sum()
            (slope,) = torch.autograd.grad(said, weight)
        return slope.float().movedim(1, 0).reshape(hidden.shape[axis] // self.columns, -1)

    def through(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Run the consumer with other weights, given per unit, (units, out · …)."""
        host = weight_of(self.consumer)
        # (out, units * columns, *taps)
        flat = weight.reshape(-1, host.shape[0], *host.shape[2:]).movedim(0, 1)
        assert flat.shape[1] == weight.shape[0] * self.columns
        return affine(self.consumer, hidden, flat.to(host.dtype), None)

    def axis(self, hidden: Tensor) -> int:
        """Return the axis of the units."""
        return hidden.dim() - 1 if is_linear(self.consumer) else 1


def column_names(outlets: Sequence[Outlet]) -> tuple[str, ...]:
    """Name the tensors a kernel has for its outlets' columns, in their order."""
    return ("consumer_weight", *(f"consumer_{index}_weight" for index in range(1, len(outlets))))
