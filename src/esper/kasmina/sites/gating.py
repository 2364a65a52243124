"""Find two layers over one input whose outputs meet in a product: a gated pair."""

from __future__ import annotations

import math
from dataclasses import replace

from esper.kasmina.recording.recorder import Refused
from esper.kasmina.recording.tracks import Met, Track
from esper.kasmina.sites.finder import Finder, labels
from esper.kasmina.widths.gated import GatedPair
from esper.kasmina.widths.layers import out_size


def gated(finder: Finder, track: Track, met: Met) -> GatedPair:
    """Return the pair of two producers whose outputs meet in a product, at the first of them."""
    path, other = partner(finder, track, met)
    calls = (finder.calls_of(name)[track.turn] for name in (track.name, path))
    first, second = (finder.recording.makers[call.makes[0]] for call in calls)
    if first > second:
        raise Refused(f"{track.name} is widened with {path}, whose output its own is multiplied by")
    joint = Track(track.name, met.call.makes[0], track.axis, batch=track.batch, turn=track.turn)
    target, call = finder.follow(joint)
    joint.flops += track.flops + other.flops
    joint.granularity = math.lcm(joint.granularity, track.granularity, other.granularity)
    plain = finder.close(joint, target, call)
    between = (*labels(track.steps), f"* {path}", *labels(other.steps), *labels(joint.steps))
    site = replace(plain.site, name=f"{track.name}*{path}>{target}", between=between)
    return GatedPair(
        site,
        plain.producer,
        finder.modules[path],
        path,
        plain.consumer,
        tuple(track.steps),
        tuple(other.steps),
        plain.steps,
        plain.columns,
        plain.places,
        plain.step_flops,
    ).refreshed()


def partner(finder: Finder, track: Track, met: Met) -> tuple[str, Track]:
    """Return the other factor's layer, which must read the same input and have the same size."""
    own, size = finder.calls_of(track.name), out_size(finder.modules[track.name])
    for path, module in finder.modules.items():
        if path == track.name or type(module) is not type(finder.modules[track.name]):
            continue
        there = meets(finder, path, track.turn)
        if there is None or there[1].call is not met.call or len(finder.calls_of(path)) != len(own):
            continue
        if finder.calls_of(path)[track.turn].reads[:1] != own[track.turn].reads[:1]:
            continue
        if there[0].axis == track.axis and out_size(module) == size:
            return path, there[0]
    raise met


def meets(finder: Finder, name: str, turn: int) -> tuple[Track, Met] | None:
    """Return how far a layer's output of one call runs alone, if it then meets another's in a product."""
    try:
        track = finder.begin(name, turn)
    except (Refused, IndexError):  # or it has not been called so often
        return None
    try:
        finder.follow(track)
    except Met as met:
        return track, met
    except Refused:
        pass
    return None
