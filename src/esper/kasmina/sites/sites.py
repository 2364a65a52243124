"""Find the pairs that can be widened, and say of every other layer why it cannot.

A pair is a producing and a consuming layer with only channel-wise operations between; a fork, with several
consumers, is found with them, and so are layers that one pass calls several times. They are found by running
the model in train and in eval mode, and count only where both agree.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from esper.contracts import Refusal
from esper.errors import SiteError, nearest
from esper.kasmina.recording.between import ELEMENTWISE
from esper.kasmina.recording.recorder import record
from esper.kasmina.sites.calling import described
from esper.kasmina.sites.finder import Finder, Refused
from esper.kasmina.sites.joining import joined
from esper.kasmina.sites.look import Found, look
from esper.kasmina.sites.reasons import why_not
from esper.kasmina.sites.selecting import Selector, Sites, refuse_selectors
from esper.kasmina.sites.uncalled import UNCALLED
from esper.kasmina.widths.layers import in_size, is_depthwise, is_layer, is_linear, out_size
from esper.kasmina.widths.pairs import Pair
from esper.kasmina.widths.places import Place
from esper.kasmina.widths.recurrent import RecurrentPair
from esper.printable import quoted, times
from esper.surgery.isolation.contexts import same_modes, same_randomness, slow_path
from esper.surgery.isolation.seam import look_through

DRAWS = 8  # of training passes, where chance decides which layers run


def find_pairs(
    model: nn.Module, run: Callable[[], object], examples: int | None = None
) -> tuple[list[Found], list[Refusal]]:
    """Return the pairs that train and eval mode agree on, and every refusal with its reason.

    Args:
        model: The host; its mode is put back.
        run: Function that calls the model once without touching training state; the caller guards buffers
            and random numbers.
        examples: Number of examples in that run, where it is known.
    """
    with same_modes(model), slow_path():
        model.eval()
        with torch.no_grad():
            evaluation = Finder(model, joined(record(model, run), model), examples)
        model.train()
        train = Draws(model, run, evaluation, examples)
    pairs: list[Found] = []
    refusals: list[Refusal] = []
    for name, module in model.named_modules():
        if not (is_layer(module) or isinstance(module, nn.RNNBase)) or is_depthwise(module):
            reason = None if is_depthwise(module) else why_not(module)
            refusals += [] if reason is None else [Refusal(name, reason)]
            continue
        try:
            pairs.append(agreed(train.look(name), look(evaluation, name)))
        except Refused as refusal:
            refusals.append(Refusal(name, str(refusal)))
    return pairs, refusals


class Draws:
    """Recordings in training: one, or several where chance decides which layers run (stochastic depth).

    Args:
        model: Host in training mode.
        run: Function that calls it once.
        evaluation: Finder of a pass in evaluation, where every layer runs.
        examples: Number of examples in that run, where it is known.
    """

    def __init__(
        self, model: nn.Module, run: Callable[[], object], evaluation: Finder, examples: int | None
    ) -> None:
        called = {name for name, used in evaluation.recording.uses.items() if used}
        self.finders: list[Finder] = []
        for seed in range(DRAWS):
            with same_randomness(seed):
                self.finders.append(Finder(model, joined(record(model, run), model), examples))
            called = {name for name in called if not self.finders[-1].recording.uses.get(name)}
            if not called:
                break

    def look(self, name: str) -> Found:
        """Return the place of a layer, from the first recording in which all of it ran.

        Raises:
            Refused: With the reason of the last one.
        """
        for finder in self.finders[:-1]:
            try:
                return look(finder, name)
            except Refused as refusal:
                if UNCALLED not in str(refusal):
                    raise
        return look(self.finders[-1], name)


def reachable(
    model: nn.Module, pairs: Sequence[Found], run: Callable[[], object]
) -> tuple[list[Found], list[Refusal]]:
    """Keep the pairs whose seams see every pass, in train mode and, without gradients, in eval mode.

    A branch would else be there in training and absent in evaluation, or the other way round. (The fast path
    of ``nn.TransformerEncoderLayer``, which calls neither of its layers, is off while a seam in it is open.)
    """
    with same_modes(model), slow_path():
        model.train()
        with torch.enable_grad():
            trained = [witnessed(pairs, run)]
            while len(trained) < DRAWS and not all(one.entered for one in merged(trained)):
                with same_randomness(len(trained)):
                    trained.append(witnessed(pairs, run))
        model.eval()
        with torch.no_grad():
            seen = [merged(trained), witnessed(pairs, run)]
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


def uncoded(pairs: Sequence[Place], sites: Sites) -> tuple[list[Place], list[Refusal]]:
    """Leave out codes, unless they are named: their width is what the user chose them for.

    A layer that is narrower than what it reads and than what is made of it again, or than these will be once
    they have grown, with no activation behind, is the code of an autoencoder, or a factor of low rank.
    """
    if sites != "auto":
        return list(pairs), []
    growing = [pair for pair in pairs if not isinstance(pair, Pair) or pair.steps]
    wider_in = {path for pair in growing for path in pair.site.exits}
    wider_out = {pair.site.entry for pair in growing}
    codes = [pair for pair in pairs if isinstance(pair, Pair) and is_code(pair, wider_in, wider_out)]
    refusals = [
        Refusal(
            pair.site.entry,
            f"its {pair.site.width} units are a code: fewer than what {pair.site.entry} reads and "
            f"{pair.site.exit} makes, or will once these grow, with no activation between; name "
            f"{pair.site.name} in sites= to grow it",
        )
        for pair in codes
    ]
    return [pair for pair in pairs if pair not in codes], refusals


def is_code(pair: Pair, wider_in: Set[str], wider_out: Set[str]) -> bool:
    """Tell a layer whose output is a code.

    Args:
        pair: Any.
        wider_in: Paths of layers whose inputs may become more.
        wider_out: Paths of layers whose outputs may become more.
    """
    if pair.steps or not (is_linear(pair.producer) and is_linear(pair.consumer)):
        return False
    read = math.inf if pair.site.entry in wider_in else in_size(pair.producer)
    made = math.inf if pair.site.exit in wider_out else out_size(pair.consumer)
    return pair.site.width < min(read, made)


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
    if isinstance(pair, RecurrentPair) and not pair.producer.batch_first and not timed(pair):
        return (
            f"{pair.site.entry} reads time as its first axis and {exits[0]} does not, which a race would not "
            "tell from examples; give it batch_first=True, or growth='early' can widen it"
        )
    if pair.ends()[0]._forward_pre_hooks:
        return (
            f"{pair.site.entry} has a forward pre-hook, and a race sees what comes in before it; "
            "growth='early' can widen it"
        )
    return ""


def timed(pair: RecurrentPair) -> bool:
    """Tell whether what a recurrent layer makes keeps its axes on the way to its consumer."""
    return pair.part == 0 and all(label in ELEMENTWISE for label in pair.site.between)


def witnessed(pairs: Sequence[Found], run: Callable[[], object]) -> list[Witness]:
    """Return how each pair's seams are passed in one run."""
    witnesses = [Witness(len(pair.site.exits)) for pair in pairs]
    closers: list[Callable[[], None]] = []
    try:
        for pair, witness in zip(pairs, witnesses, strict=True):
            entry, *exits = pair.ends()
            closers += [look_through(entry, "entry", witness)]
            closers += [
                look_through(exit_, "exit", leaving)
                for exit_, leaving in zip(exits, witness.exits, strict=True)
            ]
        run()
    finally:
        for close in closers:
            close()
    return witnesses


def merged(draws: Sequence[Sequence[Witness]]) -> list[Witness]:
    """Return what was seen of each pair: in the first draw that passed it, or passed it wrongly."""
    return [next((one for one in each if one.entered), each[-1]) for each in zip(*draws, strict=True)]


class Witness:
    """Counts how often the seams of a pair are passed, and sees to the order.

    Args:
        exits: Number of its consumers.
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
        places: Places found.
        refusals: Refusals, named in the error when nothing is left.
        sites: "auto", or globs, regular expressions or layer types (one or several) that match a place's name
            or either of its ends; a mapping with "include" and "exclude" for both directions.

    Raises:
        SiteError: Nothing matches, there is no place at all, or ``sites`` cannot be read.
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
