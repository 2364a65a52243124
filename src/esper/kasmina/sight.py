"""Look at many places in one pass: what they read, what their exits read, the gradient that comes back.

A pass that calls a place several times shows it as often; what the loss says of it is the sum over these
views. A loss may take gradients inside itself, which run back through the exits before the pass is over: only
what flows back from the loss counts.
"""

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
    """What one call of an exit showed."""

    hidden: Tensor | None  # what it reads
    made: Tensor  # what it gave, detached
    gradient: Tensor | None = None  # of the batch's mean loss for that, (batch, …)


@dataclass(slots=True)
class Sight:
    """What one call of a place showed."""

    exits: tuple[Seen, ...]
    x: Tensor | None = None  # what a kernel reads, (batch, …)
    given: Given | None = None  # what a block was called with besides its input

    @property
    def counts(self) -> bool:
        """Whether the loss depends on one of the exits."""
        return any(seen.gradient is not None for seen in self.exits)

    def complete(self) -> Sight:
        """Give an exit that the loss does not depend on the gradient it has: zero."""
        for seen in self.exits:
            if seen.gradient is None:
                seen.gradient = torch.zeros_like(seen.made)
        return self


class Eye:
    """A gateway at the entry of a place; keeps what passes, changes nothing."""

    def __init__(self, place: Place) -> None:
        self.place, self.serial = place, place.port == "serial"
        self.entered: list[Tensor | None] = []  # call by call
        self.exits = [ExitEye(self) for _ in place.ends()[1:]]
        self.open = True  # until the loss is there: a checkpoint calls layers again on the way back
        self.visits: Visits | None = None  # of a block, whose calls take more than a tensor

    def enter(self, x: Tensor | None) -> None:
        """Keep the entry's input."""
        if self.open:
            self.entered.append(None if x is None else x.detach())

    def leave(self, y: Tensor) -> Tensor:
        """Let outputs pass."""
        return y

    def close(self) -> None:
        """Take in no more calls, and let go of what flowed back while the loss was still being computed."""
        self.open = False
        for seen in [one for exit_ in self.exits for one in exit_.seen]:
            seen.gradient = None

    def sights(self) -> tuple[Sight, ...]:
        """Return what the calls showed on which the loss depends.

        None, where entry and exits were not called equally often, or several times against expectation: no
        one can say then what belongs together. A call without gradients, as for the target of a temporal
        difference, is left out: new units move it, but the loss does not see it through them.
        """
        calls = {len(exit_.seen) for exit_ in self.exits}
        xs = [seen.made for seen in self.exits[0].seen] if self.serial else self.entered
        if calls != {len(xs)} or any(x is None for x in xs) or (len(xs) > 1 and self.place.site.calls == 1):
            return ()
        given = None if self.visits is None else self.visits.given
        called = zip(*(exit_.seen for exit_ in self.exits), strict=True)
        views = [Sight(exits, x, given) for x, exits in zip(xs, called, strict=True)]
        return tuple(view.complete() for view in views if view.counts)


@dataclass(eq=False)
class ExitEye:
    """A gateway at both sides of one exit."""

    eye: Eye = field(repr=False)
    seen: list[Seen] = field(default_factory=list, repr=False)  # call by call
    hidden: Tensor | None = None  # what the call that has begun reads

    def enter(self, x: Tensor | None) -> None:
        """Keep what the exit reads."""
        self.hidden = None if x is None else x.detach()

    def leave(self, y: Tensor) -> Tensor:
        """Wait for the gradient of the exit's output."""
        if not self.eye.open:
            return y
        seen = Seen(self.hidden, y.detach())
        self.seen.append(seen)
        if y.requires_grad:
            y.register_hook(partial(receive, seen))
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
            for module, gateway in zip(exits, eye.exits, strict=True):
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
) -> Iterator[tuple[dict[str, tuple[Sight, ...]], int]]:
    """Run passes forth and back; yields what was seen at the places passed, call by call, and the examples."""
    host = [p for p in model.parameters() if p.requires_grad]
    for run, examples in runs:
        with watching(places) as eyes:
            loss = run()
            for eye in eyes.values():
                eye.close()
            torch.autograd.grad(loss, host, allow_unused=True)
        yield {name: sights for name, eye in eyes.items() if (sights := eye.sights())}, examples
