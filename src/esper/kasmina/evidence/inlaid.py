"""Evidence for a loss that takes gradients inside itself: units at zero, inlaid in the pass.

A physics-informed loss reads what the model says and how that changes with the inputs, a gradient penalty
likewise. The gradient of an exit's output tells only half of that: new units change the derivative, too. So
they run in the pass itself, with weights or steps of zero, which change nothing, and whose gradient is all
that the loss says of them. (Told by the outputs alone, a net of two layers solved a second-order equation to
an error of .86 and 2.7, told all of it to .04 and .01; two seeds.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from esper.kasmina.evidence.efficient import Move
from esper.kasmina.widths.widen import HostKernel, Widenable


class Inlay(Protocol):
    """What runs in one pass at one place."""

    leaves: dict[tuple[int, int], Tensor]  # zeros whose gradient is asked, by exit and call
    joint: bool  # whether all calls have the same, kept as the first one's

    def enter(self, x: Tensor) -> None:
        """Run the units on what a call reads."""

    def add(self, exit_: int, call: int, hidden: Tensor) -> Tensor:
        """Return what is added to the output of one call of an exit: zero."""


class Units:
    """Runs a kernel's units, call by call."""

    joint = False

    def __init__(self, kernel: HostKernel[Widenable]) -> None:
        self.kernel = kernel
        self.leaves: dict[tuple[int, int], Tensor] = {}
        self.read: list[tuple[Tensor, ...]] = []  # what each consumer reads of the units

    def enter(self, x: Tensor) -> None:
        """Run the units on what a call reads."""
        self.read.append(self.kernel.hiddens(x))


class Columns(Units):
    """Columns of zero for new units and for the host's own: for their gradient, the same in every call."""

    joint = True

    def add(self, exit_: int, call: int, hidden: Tensor) -> Tensor:
        """Return what is added to the output of one call of an exit: zero."""
        outlet = self.kernel.place.outlets[exit_]
        # (batch, …, pool + c + 1), the units along the outlet's axis
        joined = torch.cat([self.read[call][exit_], outlet.with_one(hidden)], outlet.axis(hidden))
        units = joined.shape[outlet.axis(hidden)] // outlet.columns
        zeros = joined.new_zeros(units, outlet.unit_weights, requires_grad=True)  # (pool + c + 1, out · …)
        return outlet.through(joined, self.leaves.setdefault((exit_, 0), zeros))


class Steps(Units):
    """Steps of length zero along a direction, one for each row: for what each example's loss says of it."""

    def __init__(self, kernel: HostKernel[Widenable], moves: Sequence[Move]) -> None:
        super().__init__(kernel)
        self.moves = moves

    def add(self, exit_: int, call: int, hidden: Tensor) -> Tensor:
        """Return what is added to the output of one call of an exit: zero."""
        outlet, move = self.kernel.place.outlets[exit_], self.moves[exit_]
        moved = outlet.through(self.read[call][exit_], move.new)  # (batch, …, out), as the exit's output
        moved = moved + outlet.through(outlet.with_one(hidden), move.own)
        rows = moved.shape[: max(moved.dim() - 1, 1)][:2]  # either may be the examples
        shape = (*rows, *[1] * (moved.dim() - len(rows)))  # (batch, 1, …), or (time, batch, 1, …)
        self.leaves[exit_, call] = length = moved.new_zeros(shape, requires_grad=True)
        return length * moved
