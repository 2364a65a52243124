"""Look at many places in one pass: what they read, what their exits read, the gradient that comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

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
class Sight:
    """What one pass showed at a place."""

    x: Tensor | None = None  # what a kernel reads, (batch, …)
    hidden: Tensor | None = None  # what the exit reads
    gradient: Tensor | None = None  # of the batch's mean loss for the exit's output, (batch, …)
    given: Given | None = None  # what a block was called with besides its input


class Eye:
    """A gateway at both ends of a place; keeps what passes, changes nothing."""

    def __init__(self, place: Place) -> None:
        self.place, self.sight = place, Sight()
        self.serial = place.port == "serial"
        self.visits: Visits | None = None  # of a block, whose calls take more than a tensor
        self.calls = 0  # of the exit in one pass; of several, no one can say which gradient is whose

    def enter(self, x: Tensor | None) -> None:
        """Keep the entry's input."""
        if x is not None and not self.serial:
            self.sight.x = x.detach()

    def leave(self, y: Tensor) -> Tensor:
        """Wait for the gradient of the exit's output."""
        self.calls += 1
        if self.serial:
            self.sight.x = y.detach()
        if not y.requires_grad:
            return y
        sight = self.sight

        def receive(gradient: Tensor) -> None:
            sight.gradient = gradient.detach()

        y.register_hook(receive)
        return y


class HiddenEye:
    """A gateway at the exit's own input."""

    def __init__(self, eye: Eye) -> None:
        self.eye = eye

    def enter(self, x: Tensor | None) -> None:
        """Keep what the exit reads."""
        if x is not None:
            self.eye.sight.hidden = x.detach()

    def leave(self, y: Tensor) -> Tensor:
        """Let outputs pass."""
        return y


@contextmanager
def watching(places: Mapping[str, Place]) -> Iterator[dict[str, Eye]]:
    """Open the seams of many places for a few passes."""
    eyes = {name: Eye(place) for name, place in places.items()}
    with ExitStack() as stack:
        for eye in eyes.values():
            entry, exit_ = eye.place.ends()
            if isinstance(eye.place, Stack):
                eye.visits = stack.enter_context(eye.place.listening())
            if not eye.serial:
                stack.callback(open_seam(entry, "entry", eye))
            stack.callback(open_seam(exit_, "entry", HiddenEye(eye)))
            stack.callback(open_seam(exit_, "exit", eye))
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
        seen = {name: eye.sight for name, eye in eyes.items() if eye.calls == 1}
        yield {n: s for n, s in seen.items() if s.gradient is not None and s.x is not None}, examples
