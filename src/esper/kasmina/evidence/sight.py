"""Look at many places in one pass: what they read, what their exits read, the gradient that comes back.

A pass that calls a place several times shows it as often; what the loss says of it is the sum over these
views. A loss may take gradients inside itself, which run back through the exits before the pass is over: only
what flows back from the loss counts, and units have to be inlaid in the pass to see all that it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.batchnorm import _NormBase

from esper.kasmina.depth.stack import Stack
from esper.kasmina.evidence.inlaid import Inlay
from esper.kasmina.recording.visits import RecordedCall, Visits
from esper.kasmina.widths.places import Place
from esper.surgery.isolation.contexts import same_modes, slow_path, untouched
from esper.surgery.isolation.seam import look_through

NONE: Mapping[str, Inlay] = MappingProxyType({})
Run = tuple[Callable[[], Tensor], int]  # a pass to a mean loss, and its number of examples


@dataclass(slots=True)
class Seen:
    """What one call of an exit showed."""

    hidden: Tensor | None  # what it reads, (batch, …)
    made: Tensor  # what it gave, (batch, …), detached
    gradient: Tensor | None = None  # of the batch's mean loss for that, (batch, …)
    inlaid: bool = False  # whether units are inlaid there that something may flow back to


@dataclass(slots=True)
class Sight:
    """What one call of a place showed."""

    exits: tuple[Seen, ...]
    x: Tensor | None = None  # what a kernel reads, (batch, …)
    given: RecordedCall | None = None  # what a block was called with besides its input
    back: tuple[Tensor | None, ...] = ()  # what flowed back to units inlaid, by exit; shaped as its leaves

    @property
    def counts(self) -> bool:
        """Whether the loss depends on one of the exits."""
        return any(seen.gradient is not None or seen.inlaid for seen in self.exits)

    def complete(self) -> Sight:
        """Give an exit that the loss does not depend on the gradient it has: zero."""
        for seen in self.exits:
            if seen.gradient is None:
                seen.gradient = torch.zeros_like(seen.made)
        return self


class Eye:
    """A gateway at the entry of a place; keeps what passes, changes nothing."""

    def __init__(self, place: Place, inlay: Inlay | None = None) -> None:
        self.place, self.serial = place, place.port == "serial"
        self.inlay = inlay
        self.back: dict[tuple[int, int], Tensor] = {}  # to what is inlaid, by exit and call
        self.entered: list[Tensor | None] = []  # call by call
        self.edges: list[GradientEdge] = []  # where the gradients of its exits' outputs come by
        self.exits = [ExitEye(self, index) for index in range(len(place.ends()) - 1)]
        self.open = True  # until the loss is there: a checkpoint calls layers again on the way back
        self.visits: Visits | None = None  # of a block, whose calls take more than a tensor

    def enter(self, x: Tensor | None) -> None:
        """Keep the entry's input."""
        if self.open:
            self.entered.append(None if x is None else x.detach())
            if self.inlay is not None and x is not None:
                self.inlay.enter(x)

    def leave(self, y: Tensor) -> Tensor:
        """Let outputs pass."""
        return y

    @property
    def differentiated(self) -> bool:
        """Whether something has flowed back while the loss was still being computed."""
        return any(seen.gradient is not None for exit_ in self.exits for seen in exit_.seen)

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
        counted = [(call, view.complete()) for call, view in enumerate(views) if view.counts]
        if self.inlay is not None:
            for call, view in counted[:1] if self.inlay.joint else counted:
                key = 0 if self.inlay.joint else call
                view.back = tuple(self.back.get((exit_.index, key)) for exit_ in self.exits)
        return tuple(view for _, view in counted)


@dataclass(eq=False)
class ExitEye:
    """A gateway at both sides of one exit."""

    eye: Eye = field(repr=False)
    index: int = 0
    seen: list[Seen] = field(default_factory=list, repr=False)  # call by call
    hidden: Tensor | None = field(default=None, repr=False)  # what the call that has begun reads

    def enter(self, x: Tensor | None) -> None:
        """Keep what the exit reads."""
        self.hidden = x

    def leave(self, y: Tensor) -> Tensor:
        """Wait for the gradient of the exit's output."""
        if not self.eye.open:
            return y
        inlay, hidden, self.hidden = self.eye.inlay, self.hidden, None
        seen = Seen(None if hidden is None else hidden.detach(), y.detach())
        if inlay is not None and hidden is not None:
            seen.inlaid = y.requires_grad
            y = y + inlay.add(self.index, len(self.seen), hidden)
        self.seen.append(seen)
        if y.requires_grad:
            y.register_hook(partial(receive, seen))
            self.eye.edges.append(get_gradient_edge(y))
        return y


def receive(seen: Seen, gradient: Tensor) -> None:
    """Keep what flows back."""
    seen.gradient = gradient.detach()


@contextmanager
def watching(places: Mapping[str, Place], inlays: Mapping[str, Inlay] = NONE) -> Iterator[dict[str, Eye]]:
    """Open the seams of many places for a few passes."""
    eyes = {name: Eye(place, inlays.get(name)) for name, place in places.items()}
    with ExitStack() as stack:
        for eye in eyes.values():
            entry, *exits = eye.place.ends()
            if isinstance(eye.place, Stack):
                eye.visits = stack.enter_context(eye.place.listening())
            if not eye.serial:
                stack.callback(look_through(entry, "entry", eye))
            for module, gateway in zip(exits, eye.exits, strict=True):
                stack.callback(look_through(module, "entry", gateway))
                stack.callback(look_through(module, "exit", gateway))
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
    with same_modes(model):
        judged(model)
        yield


def passes(
    model: nn.Module,
    places: Mapping[str, Place],
    runs: Sequence[Run],
    inlaid: Callable[[], Mapping[str, Inlay]] = dict,
) -> Iterator[tuple[dict[str, tuple[Sight, ...]], int]]:
    """Run passes forth and back; yields what was seen at the places passed, call by call, and the examples.

    Clear what was yielded, and the memory of one pass is enough for many. The way back goes no further than
    the exits: the gradients of the weights are a third of a pass, and as large as the model.

    Args:
        model: The host.
        places: Places to look at, by name.
        runs: Passes to mean losses, each with its number of examples.
        inlaid: Function that makes what runs within a pass, by place.
    """
    host = [p for p in model.parameters() if p.requires_grad]
    for run, examples in runs:
        inlays = inlaid()
        with watching(places, inlays) as eyes:
            loss = run()
            close(eyes)
            leaves = [(name, at, leaf) for name, one in inlays.items() for at, leaf in one.leaves.items()]
            edges = [edge for eye in eyes.values() for edge in eye.edges]
            ends = edges or [get_gradient_edge(p) for p in host]
            given = [*ends, *(get_gradient_edge(leaf) for *_, leaf in leaves)]
            back = torch.autograd.grad(loss, given, allow_unused=True)[len(ends) :]
        for (name, at, _), gradient in zip(leaves, back, strict=True):
            if gradient is not None:
                eyes[name].back[at] = gradient
        shown = {name: sights for name, eye in eyes.items() if (sights := eye.sights())}
        let_go(eyes)
        del eyes, loss, inlays, leaves, edges, ends, given, back
        yield shown, examples


def differentiates(model: nn.Module, places: Mapping[str, Place], run: Callable[[], Tensor]) -> bool:
    """Tell whether a loss takes gradients inside itself: something flows back before it is there."""
    with watching(places) as eyes, untouched(model, seed=0), torch.enable_grad():
        run()
    found = any(eye.differentiated for eye in eyes.values())
    let_go(eyes)
    return found


def close(eyes: Mapping[str, Eye]) -> None:
    """Take in no more calls."""
    for eye in eyes.values():
        eye.close()


def let_go(eyes: Mapping[str, Eye]) -> None:
    """Let go of what was seen: the gateways of entry and exits lead to each other, and would hold a pass."""
    for eye in eyes.values():
        eye.exits.clear()


def by_example(tensor: Tensor, examples: int) -> Tensor | None:
    """Return the rows of each example, (examples, …); None where they are nobody's.

    Axis 0 is the examples', or a multiple of it, or axis 1 is, where time comes first.
    """
    if tensor.dim() > 1 and tensor.shape[0] != examples and tensor.shape[1] == examples:
        tensor = tensor.transpose(0, 1)  # (time, batch, …) -> (batch, time, …)
    return None if tensor.shape[0] % examples else tensor.reshape(examples, -1)


def dead(activations: Tensor, axis: int = 1) -> float:
    """Return the share of channels at exactly zero on every example.

    Args:
        activations: (batch, c), (batch, c, …), or with the channels elsewhere.
        axis: Axis of the channels.
    """
    last = activations.movedim(axis, -1)  # (batch, …, c)
    return float((last == 0).flatten(0, -2).all(0).float().mean())  # (rows, c) -> (c,) -> ()
