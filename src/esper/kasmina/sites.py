"""Find the pairs that can be widened, and say of every other layer why it cannot.

A pair is a producing and a consuming layer with only channel-wise operations between; a fork, with several
consumers, is found with them, and so are layers that one pass calls several times. They are found by running
the model in train and in eval mode, and count only where both agree.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts import Refusal
from esper.errors import SiteError, nearest
from esper.kasmina.calling import described
from esper.kasmina.finder import Finder, Refused, times
from esper.kasmina.isolation import slow_path
from esper.kasmina.joining import joined
from esper.kasmina.layers import is_depthwise, is_layer
from esper.kasmina.look import Found, look
from esper.kasmina.places import Place
from esper.kasmina.reasons import why_not
from esper.kasmina.recorder import record
from esper.kasmina.seam import open_seam
from esper.kasmina.selecting import Selector, Sites, refuse_selectors
from esper.printable import quoted


def find_pairs(
    model: nn.Module, run: Callable[[], Any], examples: int | None = None
) -> tuple[list[Found], list[Refusal]]:
    """Return the pairs that train and eval mode agree on, and every refusal with its reason.

    Args:
        model: The host; its mode is put back.
        run: Calls the model once without touching training state; the caller guards buffers and random
            numbers.
        examples: In that run, where they are known.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with slow_path():
            model.train()
            train = Finder(model, joined(record(model, run), model), examples)
            model.eval()
            with torch.no_grad():
                evaluation = Finder(model, joined(record(model, run), model), examples)
    finally:
        for module, mode in modes.items():
            module.training = mode
    pairs: list[Found] = []
    refusals: list[Refusal] = []
    for name, module in model.named_modules():
        if not (is_layer(module) or isinstance(module, nn.RNNBase)) or is_depthwise(module):
            reason = None if is_depthwise(module) else why_not(module)
            refusals += [] if reason is None else [Refusal(name, reason)]
            continue
        try:
            pairs.append(agreed(look(train, name), look(evaluation, name)))
        except Refused as refusal:
            refusals.append(Refusal(name, str(refusal)))
    return pairs, refusals


def reachable(
    model: nn.Module, pairs: Sequence[Found], run: Callable[[], Any]
) -> tuple[list[Found], list[Refusal]]:
    """Keep the pairs whose seams see every pass, in train mode and, without gradients, in eval mode.

    A branch would else be there in training and absent in evaluation, or the other way round. (The fast path
    of ``nn.TransformerEncoderLayer``, which calls neither of its layers, is off while a seam in it is open.)
    """
    modes = {module: module.training for module in model.modules()}
    seen: list[list[Witness]] = []
    try:
        for training in (True, False):
            model.train(training)
            with slow_path(), torch.set_grad_enabled(training):
                seen.append(witnessed(pairs, run))
    finally:
        for module, mode in modes.items():
            module.training = mode
    kept: list[Found] = []
    refusals: list[Refusal] = []
    for pair, train, evaluation in zip(pairs, *seen, strict=True):
        if train.passed(pair.site.calls) and evaluation.passed(pair.site.calls):
            kept.append(pair)
            continue
        mode = "evaluation" if train.passed(pair.site.calls) else "training"
        names = " and ".join((pair.site.entry, *pair.site.exits))
        reason = f"{names} are not called as modules in {mode}"
        refusals.append(Refusal(pair.site.entry, reason))
    return kept, refusals


def racing(pairs: Sequence[Found]) -> tuple[list[Found], list[Refusal]]:
    """Keep the pairs a race can take: those with one output, made once, that its branch is added to."""
    kept = [pair for pair in pairs if not why_not_raced(pair)]
    refusals = [Refusal(pair.site.entry, why) for pair in pairs if (why := why_not_raced(pair))]
    return kept, refusals


def why_not_raced(pair: Found) -> str:
    """Say why a race cannot take a place with several exits or calls, and what can; "" where it can."""
    exits, calls = pair.site.exits, pair.site.calls
    if len(exits) > 1:
        return (
            f"the output of {pair.site.entry} has {len(exits)} consumers ({', '.join(exits)}), and a race "
            "adds its branch to one output; growth='early' can widen it"
        )
    if calls > 1:
        return (
            f"{pair.site.entry} is called {times(calls)} in a pass, and a race adds its branch to the output "
            "of one call; growth='early' can widen it"
        )
    return ""


def witnessed(pairs: Sequence[Found], run: Callable[[], Any]) -> list[Witness]:
    """Return how each pair's seams are passed in one run."""
    witnesses = [Witness(len(pair.site.exits)) for pair in pairs]
    closers: list[Callable[[], None]] = []
    try:
        for pair, witness in zip(pairs, witnesses, strict=True):
            entry, *exits = pair.ends()
            closers += [open_seam(entry, "entry", witness)]
            closers += [
                open_seam(exit_, "exit", leaving) for exit_, leaving in zip(exits, witness.exits, strict=True)
            ]
        run()
    finally:
        for close in closers:
            close()
    return witnesses


class Witness:
    """Counts how often the seams of a pair are passed, and sees to the order.

    Args:
        exits: How many it has.
    """

    def __init__(self, exits: int) -> None:
        self.entered, self.ordered = 0, True
        self.exits = [Leaving(self) for _ in range(exits)]

    def enter(self, x: Tensor | None) -> None:
        """Count the entry."""
        self.entered += 1

    def leave(self, y: Tensor) -> Tensor:
        """Let outputs pass."""
        return y

    def passed(self, calls: int) -> bool:
        """Tell whether entry and exits were called so often, each exit after the entry it belongs to."""
        return self.ordered and self.entered == calls and all(one.left == calls for one in self.exits)


class Leaving:
    """Counts how often one exit of a pair is passed."""

    def __init__(self, witness: Witness) -> None:
        self.witness, self.left = witness, 0

    def enter(self, x: Tensor | None) -> None:
        """Let inputs pass."""

    def leave(self, y: Tensor) -> Tensor:
        """Count the exit."""
        self.left += 1
        self.witness.ordered &= self.left <= self.witness.entered
        return y


def agreed(train: Found, evaluation: Found) -> Found:
    """Return the pair both modes found."""
    ours, theirs = train.site, evaluation.site
    if ours.calls != theirs.calls:
        raise Refused(
            f"{ours.entry} is called {times(ours.calls)} in a pass in training and {times(theirs.calls)} in "
            "eval mode"
        )
    if ours != theirs:
        raise Refused(f"{ours.entry} takes another path in eval mode: {described(ours)}, {described(theirs)}")
    return train


def select(places: Iterable[Place], refusals: Sequence[Refusal], sites: Sites = "auto") -> list[Place]:
    """Keep the places the user asked for.

    Args:
        places: What was found.
        refusals: Named in the error when nothing is left.
        sites: "auto", or globs, regular expressions or layer types (one or several) that match a place's name
            or either of its ends; a mapping with "include" and "exclude" for both directions.

    Raises:
        SiteError: Nothing matches, or there is no place at all.
    """
    refuse_selectors(sites)
    found = list(places)
    if not found:
        listed = (
            "; ".join(f"{r.place}: {r.reason}" for r in refusals)
            or "the model has no Linear or convolution layer"
        )
        raise SiteError(
            f"no place to grow was found ({listed}). "
            "A pair of layers with only channel-wise operations between, or a fitting blueprint, is needed"
        )
    include, exclude = (
        (sites.get("include", "auto"), sites.get("exclude", ()))
        if isinstance(sites, Mapping)
        else (sites, ())
    )
    chosen = [p for p in found if matches(p, include) and not (exclude != () and matches(p, exclude))]
    if not chosen:
        raise SiteError(
            f"sites={quoted(sites)} matches none of the places found; "
            f"{nearest(str(include)[:80], [p.site.name for p in found])}"
        )
    return chosen


def matches(place: Place, wanted: Selector | Sequence[Selector]) -> bool:
    """Tell whether a place is meant by one of the selectors."""
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return any(matches(place, one) for one in wanted)
    names = (place.site.name, place.site.entry, *place.site.exits)
    if isinstance(wanted, re.Pattern):
        return any(wanted.search(name) for name in names)
    if isinstance(wanted, type):
        return isinstance(place.ends()[0], wanted)
    return wanted == "auto" or any(fnmatch.fnmatchcase(name, wanted) for name in names)
