"""Offer a place only if growing it is proven: all are grown, on copies, and every number has to agree.

What a kernel adds beside the host as it is, and what the same units do once they are rows and columns of its
layers, is one function in two forms: the results and every gradient must be equal, in training and in
evaluation, at two batch sizes, the second with smaller images or shorter sequences where the host runs on
such. What no recording shows, shows here: a ``forward`` of the user's own or a
hook, a number read from a width, a literal ``view``, an autograd function with another backward, dropout that
is always on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from esper.contracts import WidenEdit, WidenPlan
from esper.errors import SurgeryError
from esper.kasmina.proving.beside import Passage, beside
from esper.kasmina.proving.comparing import Numbers, unlike
from esper.kasmina.proving.drawing import drawn, stand_out
from esper.kasmina.proving.embedded import Embedded, Key
from esper.kasmina.proving.suspects import suspect
from esper.kasmina.recording.recorder import tensors
from esper.kasmina.widths.fitting import fitted
from esper.kasmina.widths.layers import coarsest
from esper.kasmina.widths.places import WidenPlace
from esper.kasmina.widths.widen import HostKernel, Widenable
from esper.surgery.isolation.contexts import same_randomness, slow_path, untouched
from esper.surgery.isolation.copies import on_copies, stirred
from esper.surgery.isolation.without_dropout import still
from esper.surgery.widen_layers import Holders, asked, widen

Pass: TypeAlias = "Callable[[nn.Module], object]"  # calls a model once
Kernels: TypeAlias = "dict[str, HostKernel[Widenable]]"
Plans: TypeAlias = "dict[str, WidenPlan]"
Laid: TypeAlias = "dict[str, dict[str, Tensor]]"  # units in the order of the host's tensors

ROUNDING = 2e-3  # relative, in float32; 1e-6 to 1e-4 were seen
COARSE = 0.15  # in half precision
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


@dataclass(frozen=True)
class Mode:
    """A way to run the host that has to come out the same."""

    name: str
    training: bool
    call: int  # which of the passes
    fallback: int = 0  # the one that is taken where that does not run


class KeptResult:
    """A hook that keeps what a module returns."""

    def __init__(self, made: list[object]) -> None:
        self.made = made

    def __call__(self, module: nn.Module, args: object, result: object) -> None:
        """Keep it."""
        self.made.append(result)


class Proof:
    """Grows places of one host, and compares.

    Args:
        host: Only copies of what it holds are changed.
        calls: Functions, each of which calls it on a batch of its own; the others are smaller.
        cropped: Call it on inputs of another size. The first that the host can take is used.
    """

    def __init__(self, host: nn.Module, calls: Sequence[Pass], cropped: Sequence[Pass] = ()) -> None:
        self.host, self.calls, self.cropped = host, list(calls), list(cropped)
        last = len(calls) - 1
        self.modes = [Mode("training", True, 0), Mode("evaluation", False, last)]
        self.now = self.modes[0]  # the one that is run
        self.drops = True  # whether dropout may be called in training, as far as is known

    def settle(self) -> None:
        """Let evaluation run on inputs of another size, where the host does that at all."""
        evaluation = self.modes[-1]
        for call in self.cropped:
            self.calls.append(call)
            mode = Mode("evaluation, with inputs of another size", False, len(self.calls) - 1)
            try:
                self.run(mode, [])
            except Exception:  # the user's code at a size nobody promised: it raises what it likes
                self.calls.pop()
                continue
            self.modes[-1] = replace(mode, fallback=evaluation.call)
            break
        self.cropped = []

    def unproven(self, places: Mapping[str, WidenPlace]) -> dict[str, str]:
        """Return the places whose growth is not proven, and why.

        All are grown at once, and by halves only where that fails.
        """
        why = self.fails(places)
        if not why:
            return {}
        if len(places) == 1:
            return {name: suspect(place, why) for name, place in places.items()}
        names = list(places)
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        found: dict[str, str] = {}
        for half in halves:
            found |= self.unproven({name: places[name] for name in half})
        return found

    def fails(self, places: Mapping[str, WidenPlace]) -> str:
        """Grow these places together; returns what differs, "" if nothing does."""
        with same_randomness(0), torch.no_grad():
            kernels = {name: drawn(place) for name, place in places.items()}
            held = dict(self.host.named_parameters())
            for name, kernel in kernels.items():
                stand_out(kernel, places[name].plan(kernel.units), held)
        plans = {name: kernel.plan() for name, kernel in kernels.items()}
        laid = {name: kernel.slices(plans[name]) for name, kernel in kernels.items()}
        with on_copies(self.host, stirred):
            if self.cropped:
                self.settle()
            try:
                with beside(places, kernels) as passage:
                    before = [self.beside(mode, kernels, plans, passage) for mode in self.modes]
            except FAILURES as error:
                mode = self.now
                if self.breaks():
                    return self.fails(places)
                return f"new units do not run beside them in {mode.name} ({first_line(error)})"
            if passage.missing:
                site = places[passage.missing[0]].site
                return f"{site.entry} does not lead to {site.exit} at every call"
            try:
                where = self.widened(places, kernels, plans, laid)
                after = [self.grown(mode, where) for mode in self.modes]
            except (*FAILURES, SurgeryError) as error:
                return f"the model does not run once it is wider ({first_line(error)})"
        ends = [end for place in places.values() for end in place.ends()]
        step = max(passage.coarsest, coarsest(ends))
        within = COARSE if step > torch.finfo(torch.float32).eps else ROUNDING
        for mode, one, other in zip(list(self.modes), before, after, strict=True):
            if why := unlike(one, other, within):
                if self.repeats(mode):
                    return f"{why} in {mode.name}"
                self.modes.remove(mode)  # two equal passes differ: nothing can be compared
        return "" if self.modes else "two passes over the same batch with the same random numbers differ"

    def widened(
        self, places: Mapping[str, WidenPlace], kernels: Kernels, plans: Plans, laid: Laid
    ) -> Embedded:
        """Make the units part of the host's layers, consumers first; returns where they are."""
        where = Embedded({**dict(self.host.named_parameters()), **dict(self.host.named_buffers())})
        holders = Holders(self.host)
        columns: dict[Key, Tensor] = {}
        grown: set[tuple[str, object]] = set()  # axes and numbers that are others by now
        with torch.no_grad():
            for name in list(places)[::-1]:
                kernel, plan = kernels[name], plans[name]
                if grown & changes(plan):  # another place has widened the same axis
                    plan = places[name].plan(kernel.units)
                grown |= changes(plan)
                behind = {key for key, edit in plan.keyed() if edit.source in kernel.outgoing}
                columns |= {(name, key): laid[name][key] for key in behind}
                slices = dict(laid[name])
                for key, shape in asked(holders, plan).items():
                    if key in behind:
                        slices[key] = slices[key].new_zeros(shape)
                    elif list(slices[key].shape) != shape:  # what it reads has grown, too
                        slices = fitted(places[name], kernel, kernel.units).slices(plan)
                        break
                widen(self.host, plan, slices, holders)
                where.note(name, plan)
            tensors = dict(self.host.named_parameters())
            for key, value in columns.items():  # once all is in place: columns pass over rows that are new
                where.put(key, tensors[key[1]], value)
        return where

    def beside(self, mode: Mode, kernels: Kernels, plans: Plans, passage: Passage) -> Numbers:
        """Run the host as it is, with the kernels beside it."""
        passage.begin()
        units = {(name, own): p for name, kernel in kernels.items() for own, p in kernel.named_parameters()}
        results, gradients, back = self.run(mode, list(units.values()))
        passage.end(mode.training)
        if not mode.training:
            return Numbers(results, gradients, {})
        of = dict(zip(units, back, strict=True))
        slices = {
            (name, key): kernel.lay(edit, of[name, edit.source])
            for name, kernel in kernels.items()
            for key, edit in alone(plans[name])
            if (name, edit.source) in of
        }
        return Numbers(results, gradients, slices)

    def grown(self, mode: Mode, where: Embedded) -> Numbers:
        """Run the host with all units in its layers."""
        results, gradients, _ = self.run(mode, [])
        own = {name: where.own(name, one) for name, one in gradients.items()}
        slices = {key: where.slice_(key, gradients[key[1]]) for key in where.new if key[1] in gradients}
        return Numbers(results, own, slices)

    def run(
        self, mode: Mode, units: Sequence[Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
        """Run the host once; returns results, its gradients and those of units, in training only."""
        self.now = mode
        host = {name: p for name, p in self.host.named_parameters() if p.requires_grad}
        self.host.train(mode.training)
        learns = mode.training
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(learns))
            stack.enter_context(slow_path())
            stack.enter_context(untouched(self.host, seed=0))
            dropping = stack.enter_context(still(self.host, self.drops)) if learns else None
            results = self.said(self.calls[mode.call])
            back = derivatives(results, [*host.values(), *units]) if learns else []
        if dropping is not None:
            self.drops = dropping.met  # what it calls beside new units, it calls with them in its layers
        results = [result.detach() for result in results]
        return results, dict(zip(host, back, strict=False)), back[len(host) :]

    def said(self, call: Pass) -> list[Tensor]:
        """Run the host; returns what it says, or the loss where it is not called as a whole.

        A loss that looks at weights, too, says something else of more of them.
        """
        made: list[object] = []
        hook = self.host.register_forward_hook(KeptResult(made))
        try:
            loss = call(self.host)
        finally:
            hook.remove()
        return [one for one in tensors(made or loss) if one.is_floating_point()]

    def breaks(self) -> bool:
        """Leave out the modes in which the host does not run by itself; tells whether there were any.

        A loss may not take a smaller batch, and a host that is never trained may not be differentiable.
        """
        before = self.modes
        ran = {mode: self.runs(mode) for mode in before}
        self.modes = [
            mode if ran[mode] else replace(mode, call=mode.fallback, fallback=0)
            for mode in before
            if ran[mode] or mode.call
        ]
        return self.modes != before

    def runs(self, mode: Mode) -> bool:
        """Tell whether the host runs by itself."""
        try:
            with on_copies(self.host, stirred):
                self.run(mode, [])
        except FAILURES:
            return False
        return True

    def repeats(self, mode: Mode) -> bool:
        """Tell whether two passes in a mode come out the same, bit for bit."""
        try:
            with on_copies(self.host, stirred):
                (one, _, _), (two, _, _) = self.run(mode, []), self.run(mode, [])
        except FAILURES:
            return False
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def changes(plan: WidenPlan) -> set[tuple[str, object]]:
    """List the axes and the numbers that a plan changes."""
    changed: set[tuple[str, object]] = {(edit.name, edit.axis) for edit in plan.edits}
    return changed | {(path, own) for path, own, _ in plan.attributes}


def alone(plan: WidenPlan) -> list[tuple[str, WidenEdit]]:
    """List the edits whose tensor goes to one place only: its gradient is the place's."""
    sources = [edit.source for edit in plan.edits]
    return [(key, edit) for key, edit in plan.keyed() if sources.count(edit.source) == 1]


def derivatives(results: Sequence[Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    """Return gradients of a loss, or of a sum in which every result counts differently; zero where none."""
    scalars = [(r * weights(r)).sum() if r.numel() > 1 else r.sum() for r in results if r.requires_grad]
    if not scalars or not given:
        return [torch.zeros_like(one) for one in given]
    total = sum(scalars[1:], scalars[0])
    back = torch.autograd.grad(total, given, allow_unused=True)
    return [torch.zeros_like(p) if g is None else dense(g) for p, g in zip(given, back, strict=True)]


def dense(gradient: Tensor) -> Tensor:
    """Write out what an embedding with sparse gradients gives."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def weights(result: Tensor) -> Tensor:
    """Return a weight for each number of a result."""
    numbers = torch.arange(result.numel(), device=result.device, dtype=torch.float32)
    return numbers.cos().reshape(result.shape).to(result.dtype)


def first_line(error: Exception) -> str:
    """Return what an error says first."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
