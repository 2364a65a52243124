"""Look at many places in one pass: what they read, what their exits read, the gradient that comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from esper.kasmina.isolation import slow_path
from esper.kasmina.places import Place
from esper.kasmina.seam import open_seam
from esper.kasmina.stack import Stack
from esper.kasmina.visits import Given, Visits

Run = tuple[Callable[[], Tensor], int]  # a pass to a mean loss, and its number of examples


@dataclass(slots=True)
class Seen:
    """What one pass showed at an exit."""

    hidden: Tensor | None = None  # what it reads
    made: Tensor | None = None  # what it gave, detached
    gradient: Tensor | None = None  # of the batch's mean loss for that, (batch, …)
    calls: int = 0  # of several, no one can say which gradient is whose


@dataclass(slots=True)
class Sight:
    """What one pass showed at a place."""

    exits: tuple[Seen, ...]
    x: Tensor | None = None  # what a kernel reads, (batch, …)
    given: Given | None = None  # what a block was called with besides its input

    @property
    def whole(self) -> bool:
        """Whether the pass ran once through entry and every exit, and the loss depends on one of these."""
        passed = self.x is not None and all(seen.calls == 1 for seen in self.exits)
        return passed and any(seen.gradient is not None for seen in self.exits)

    def complete(self) -> None:
        """Give an exit that the loss does not depend on the gradient it has: zero."""
        for seen in self.exits:
            if seen.gradient is None and seen.made is not None:
                seen.gradient = torch.zeros_like(seen.made)


class Eye:
    """A gateway at the entry of a place; keeps what passes, changes nothing."""

    def __init__(self, place: Place) -> None:
        self.place, self.sight = place, Sight(tuple(Seen() for _ in place.ends()[1:]))
        self.serial = place.port == "serial"
        self.visits: Visits | None = None  # of a block, whose calls take more than a tensor

    def enter(self, x: Tensor | None) -> None:
        """Keep the entry's input."""
        if x is not None and not self.serial:
            self.sight.x = x.detach()

    def leave(self, y: Tensor) -> Tensor:
        """Let outputs pass."""
        return y


@dataclass(eq=False)
class ExitEye:
    """A gateway at both sides of one exit."""

    eye: Eye
    seen: Seen = field(repr=False)

    def enter(self, x: Tensor | None) -> None:
        """Keep what the exit reads."""
        if x is not None:
            self.seen.hidden = x.detach()

    def leave(self, y: Tensor) -> Tensor:
        """Wait for the gradient of the exit's output."""
        self.seen.made = y.detach()
        self.seen.calls += 1
        if self.eye.serial:
            self.eye.sight.x = self.seen.made
        if y.requires_grad:
            y.register_hook(partial(receive, self.seen))
        return y


def receive(seen: Seen, gradient: Tensor) -> None:
    """Keep what flows back."""
    seen.gradient = gradient.detach()


@contextmanager
def watching(places: Mapping[str, Place]) -> Iterator[dict[str, Eye]]:
    """Open the seams of many places for a few passes."""
    eyes = {name: Eye(place) for name, place in places.items()}
    with ExitStack() as stack:
        for eye in eyes.values():
            entry, *exits = eye.place.ends()
            if isinstance(eye.place, Stack):
                eye.visits = stack.enter_context(eye.place.listening())
            if not eye.serial:
                stack.callback(open_seam(entry, "entry", eye))
            for module, seen in zip(exits, eye.sight.exits, strict=True):
                gateway = ExitEye(eye, seen)
                stack.callback(open_seam(module, "entry", gateway))
                stack.callback(open_seam(module, "exit", gateway))
        stack.enter_context(slow_path())
        yield eyes


def judged(model: nn.Module) -> None:
    """Put a model into eval mode, but for norms that know a batch."""
    model.eval()
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.training = True


@contextmanager
def judging(model: nn.Module) -> Iterator[None]:
    """Run passes in eval mode, but normalise by the batch: new channels have no running statistics yet."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        judged(model)
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def passes(
    model: nn.Module, places: Mapping[str, Place], runs: Sequence[Run]
) -> Iterator[tuple[dict[str, Sight], int]]:
    """Run passes forth and back; yields what was seen at the places passed once, and the examples."""
    host = [p for p in model.parameters() if p.requires_grad]
    for run, examples in runs:
        with watching(places) as eyes:
            torch.autograd.grad(run(), host, allow_unused=True)
            for eye in eyes.values():
                eye.sight.given = None if eye.visits is None else eye.visits.given
        found = {name: eye.sight for name, eye in eyes.items() if eye.sight.whole}
        for sight in found.values():
            sight.complete()
        yield found, examples
