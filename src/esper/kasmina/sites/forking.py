"""Find several layers that read one layer's output: a fork."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from esper.contracts import Site
from esper.kasmina.recording.between import ELEMENTWISE, Step
from esper.kasmina.recording.recorder import Call, Recording, Refused
from esper.kasmina.recording.tracks import Parted, Track
from esper.kasmina.sites.finder import Finder, labels, positions
from esper.kasmina.widths.fork import Branch, Fork, Stretch
from esper.kasmina.widths.layers import in_size, out_size
from esper.kasmina.widths.outlets import Outlet


@dataclass
class Tree:
    """What was found behind a producer so far."""

    stretches: list[Stretch] = field(default_factory=list)
    landings: list[tuple[int, Branch, tuple[str, ...]]] = field(default_factory=list)  # when each runs; steps
    flops: int = 0
    granularity: int = 1

    def add(self, source: int | None, track: Track, steps: Sequence[Step]) -> int:
        """Append a stretch; returns its number."""
        self.stretches.append(Stretch(source, tuple(steps)))
        self.flops += track.flops
        self.granularity = math.lcm(self.granularity, track.granularity)
        return len(self.stretches) - 1


def forked(finder: Finder, track: Track, parted: Parted) -> Fork:
    """Return the fork behind a layer.

    Args:
        finder: Finder that knows the recording.
        track: Track of the layer's output, as far as it runs as one.
        parted: Calls that read it there.

    Raises:
        Refused: One of its ways leads to no layer that could take more inputs; with both reasons.
    """
    tree, name = Tree(), track.name
    try:
        part(finder, track, parted, tree, None, ())
    except Parted as further:
        raise Refused(str(further)) from None
    except Refused as refusal:
        raise Refused(f"{parted}; {refusal}") from None
    landings = sorted(tree.landings, key=lambda one: one[0])
    branches = tuple(branch for _, branch, _ in landings)
    first, *others = (branch.path for branch in branches)
    between = (*labels(track.steps), *(f"{b.path}: {' → '.join(own)}" for _, b, own in landings if own))
    site = Site(
        name=f"{name}>{'+'.join(branch.path for branch in branches)}",
        kind="pair",
        entry=name,
        exit=first,
        between=between,
        width=out_size(finder.modules[name]),
        granularity=tree.granularity,
        unit_parameters=0,
        unit_flops=0,
        others=tuple(others),
    )
    producer = finder.modules[name]
    runs = positions(finder.calls_of(name)[track.turn], producer)
    return Fork(site, producer, tuple(tree.stretches), branches, runs, tree.flops).refreshed()


def part(
    finder: Finder, track: Track, parted: Parted, tree: Tree, source: int | None, own: tuple[str, ...]
) -> None:
    """Follow every way that leads on from where a track has parted.

    Args:
        finder: Finder that knows the recording.
        track: Leads to the parting.
        parted: Calls that read there.
        tree: Takes what is found.
        source: The stretch the track goes on from.
        own: Labels of the steps between the first parting and the track.
    """
    ways = grouped(finder.recording, parted.readers)
    if len(ways) == 1:
        raise parted  # they depend on each other, and are no activation that could be repeated
    here = tree.add(source, track, track.steps)
    for readers in ways:
        way = Track(track.name, track.value, track.axis, batch=track.batch, turn=track.turn)
        try:
            target, call = finder.follow(way, readers)
        except Parted as further:
            part(finder, way, further, tree, here, (*own, *labels(way.steps)))
            continue
        consumer = finder.modules[target]
        steps = finder.landed(way, target, call)
        stretch = tree.add(here, way, steps)
        outlet = Outlet(consumer, in_size(consumer) // out_size(finder.modules[way.name]))
        branch = Branch(target, outlet, stretch, positions(call, consumer))
        when = next(i for i, one in enumerate(finder.recording.calls) if one is call)
        tree.landings.append((when, branch, (*own, *labels(steps))))


def grouped(recording: Recording, readers: Sequence[Call]) -> list[list[Call]]:
    """Sort the readers of a value into ways; those whose results meet, as in ``x * sigmoid(x)``, go one."""
    ways: list[tuple[set[int], list[Call]]] = []
    for reader in readers:
        reached, calls = ahead(recording, reader), [reader]
        for other in [one for one in ways if not reached.isdisjoint(one[0])]:
            ways.remove(other)
            reached, calls = reached | other[0], [*other[1], *calls]
        ways.append((reached, calls))
    return [calls for _, calls in ways]


def ahead(recording: Recording, reader: Call) -> set[int]:
    """Return a call and the elementwise ones its result runs through, as numbers."""
    first = next(i for i, call in enumerate(recording.calls) if call is reader)
    reached, open_ = set[int](), [first]
    while open_:
        index = open_.pop()
        call = recording.calls[index]
        if index in reached or (call.parameters and index != first):
            continue
        reached.add(index)
        if call.name in ELEMENTWISE and not call.parameters:
            open_ += [r for value in call.makes for r in recording.readers.get(value, [])]
    return reached
