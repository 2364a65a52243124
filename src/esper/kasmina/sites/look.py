"""Look at one layer: the place behind it, of whichever kind, or the reason why there is none."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from esper.kasmina.recording.recorder import Refused
from esper.kasmina.recording.tracks import Met, Parted, Track
from esper.kasmina.sites.calling import joint
from esper.kasmina.sites.finder import Finder
from esper.kasmina.sites.forking import forked
from esper.kasmina.sites.gating import gated
from esper.kasmina.sites.proof import heads_of
from esper.kasmina.sites.recurrences import recurrent
from esper.kasmina.widths.fork import Fork
from esper.kasmina.widths.gated import GatedPair
from esper.kasmina.widths.heads import HeadsPair
from esper.kasmina.widths.pairs import Pair
from esper.kasmina.widths.recurrent import RecurrentPair

Found: TypeAlias = "Pair | Fork | GatedPair | HeadsPair | RecurrentPair"  # what widens the user's own layers


def look(finder: Finder, name: str) -> Found:
    """Return what can be widened behind ``name``; raise the reason where nothing can."""
    if isinstance(finder.modules[name], nn.RNNBase):
        return recurrent(finder, name)
    views: list[Pair | Fork | GatedPair] = []
    for turn in range(len(finder.calls_of(name))):
        track = finder.begin(name, turn)
        try:
            views.append(behind(finder, track))
        except Met as met:
            views.append(gated(finder, track, met))
        except Refused as refusal:
            if turn > 0:  # the calls before lead somewhere
                raise Refused(f"call {turn + 1} of {name} leads nowhere: {refusal}") from None
            if name not in finder.attentions:
                raise
            return heads(finder, name, refusal)
    return joint(finder, views)


def heads(finder: Finder, name: str, refusal: Refused) -> HeadsPair:
    """Return the place of a layer in front of attention."""
    path, last = finder.attentions[name]
    found = last.found(path)
    for part in dict.fromkeys(found.names):
        finder.only_call(part)
    if name != found.names[0]:
        raise Refused(f"{name} is widened with {found.names[0]}, as heads") from refusal
    return heads_of(finder.modules, found, finder.entered)


def behind(finder: Finder, track: Track) -> Pair | Fork:
    """Return the place behind one layer, with one consumer or several."""
    try:
        return finder.close(track, *finder.follow(track))
    except Parted as parted:
        return forked(finder, track, parted)
