"""Let kernels run beside the host at full strength, several at once, with gradients through and through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from esper.kasmina.widths.places import Place
from esper.kasmina.widths.widen import HostKernel, Widenable
from esper.surgery.isolation.seam import look_through


class Beside:
    """A gateway at the entry of a place: what enters is run by the kernel, call by call."""

    def __init__(self, kernel: HostKernel[Widenable], exits: int, calls: int) -> None:
        self.kernel, self.calls = kernel, calls
        self.made: list[tuple[Tensor, ...]] = []  # what each call adds to every exit
        self.coarsest = 0.0  # step of the numbers that exits compute in: autocast is seen only here
        self.exits = [BesideExit(self, index) for index in range(exits)]

    def enter(self, x: Tensor | None) -> None:
        """Run the units on what a call reads."""
        if x is not None:
            made = self.kernel(x)
            self.made.append(made if isinstance(made, tuple) else (made,))

    def leave(self, y: Tensor) -> Tensor:
        """Let outputs pass."""
        return y

    @property
    def passed(self) -> bool:
        """Tell whether every entry led to every exit; a checkpoint may call layers again on the way back."""
        return len(self.made) >= self.calls and all(one.left >= self.calls for one in self.exits)


class BesideExit:
    """A gateway at one exit."""

    def __init__(self, entry: Beside, index: int) -> None:
        self.entry, self.index, self.left = entry, index, 0

    def enter(self, x: Tensor | None) -> None:
        """Let inputs pass."""

    def leave(self, y: Tensor) -> Tensor:
        """Add what the units say to the call that is next."""
        self.left += 1
        made = self.entry.made
        self.entry.coarsest = max(self.entry.coarsest, torch.finfo(y.dtype).eps)
        if not made:
            self.left -= 1  # it ran before the entry
            return y
        again = self.left > self.entry.calls  # on the way back, where the order is another
        return y + made[-1 if again else min(self.left, len(made)) - 1][self.index].to(y.dtype)


class Passage:
    """What the seams of several places saw of a pass."""

    def __init__(self, entries: Mapping[str, Beside]) -> None:
        self.entries = entries
        self.missing: list[str] = []
        self.coarsest = 0.0  # step of the numbers an exit computes in

    def begin(self) -> None:
        """Begin another pass."""
        for one in self.entries.values():
            one.made.clear()
            for exit_ in one.exits:
                exit_.left = 0

    def end(self, training: bool) -> None:
        """Note which places were not passed as often as they should be, and how coarse their numbers are.

        In training chance may pass a place by, as stochastic depth does.
        """
        self.missing += [
            n for n, one in self.entries.items() if not (one.passed or (training and not one.made))
        ]
        self.coarsest = max(self.coarsest, *(one.coarsest for one in self.entries.values()))


@contextmanager
def beside(places: Mapping[str, Place], kernels: Mapping[str, HostKernel[Widenable]]) -> Iterator[Passage]:
    """Open the seams of places for their kernels; yields what they see."""
    entries: dict[str, Beside] = {}
    with ExitStack() as stack:
        for name, place in places.items():
            entry, *exits = place.ends()
            entries[name] = one = Beside(kernels[name], len(exits), place.site.calls)
            stack.callback(look_through(entry, "entry", one))
            for module, gateway in zip(exits, one.exits, strict=True):
                stack.callback(look_through(module, "exit", gateway))
        yield Passage(entries)
    for one in entries.values():
        one.exits.clear()  # they lead back to it; kernels should go with the last that holds them
