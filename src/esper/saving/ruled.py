"""Places whose width one number of a config rules: a config can say what they become only if it is the same.

Which these are is found as in pretrained.py: a model is built, on the meta device, from the config with one
number changed; what is larger then is ruled by it, if it is as large as with one group of units more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

from torch import nn

from esper.kasmina.morphable import MISTAKES
from esper.kasmina.widths.places import Place, WidenPlace
from esper.saving.pretrained import (
    Shapes,
    built,
    built_from_configs,
    candidates,
    search,
    shapes_of,
    tried,
)
from esper.surgery.isolation.contexts import same_randomness

MOST = 12  # models built in search of what rules which places

Ties: TypeAlias = "tuple[frozenset[str], ...]"
Larger: TypeAlias = "Mapping[str, tuple[int, int]]"  # tensors of a place: the axis that grows, its new size


def ties(host: nn.Module, places: Mapping[str, Place]) -> Ties:
    """Return sets of places, each ruled by one number of a config; two places are in one, or more.

    Args:
        host: It may be built from a config, or hold such models; any other has none, and nothing is built.
        places: By name.
    """
    found: list[frozenset[str]] = []
    for path, model in built_from_configs(host):
        prefix = f"{path}." if path else ""
        inside = {n: p for n, p in places.items() if isinstance(p, WidenPlace) and held(p, prefix)}
        with suppress(*MISTAKES), same_randomness(0):  # what cannot be built is told at the end
            found += groups(model, {name: grown(place, prefix) for name, place in inside.items()})
    return tuple(found)


def held(place: WidenPlace, prefix: str) -> bool:
    """Tell whether all layers of a place are below a path."""
    return all(end.startswith(prefix) for end in (place.site.entry, *place.site.exits))


def grown(place: WidenPlace, prefix: str) -> Larger:
    """Say what becomes larger with one group of units more."""
    edits = place.plan(place.site.granularity).edits
    return {edit.name.removeprefix(prefix): (edit.axis, edit.new) for edit in edits}


def more(now: Shapes, edits: Iterable[Larger]) -> Shapes:
    """Return all shapes as they are once these places have grown."""
    shapes = {name: list(shape) for name, shape in now.items()}
    for one in edits:
        for name, (axis, size) in one.items():
            shapes[name][axis] = size
    return {name: tuple(shape) for name, shape in shapes.items()}


def groups(model: nn.Module, edits: Mapping[str, Larger]) -> Iterator[frozenset[str]]:
    """Yield sets of places that one number rules."""
    now, config = shapes_of(model), copy.deepcopy(vars(model)["config"])
    _, missing = search(model, config, now, shapes_of(built(model, config)))
    if missing:  # it cannot say what the model is by now
        return
    left = dict(edits)
    for change in candidates(config, more(now, edits.values()), now)[:MOST]:
        if len(left) < 2:
            return
        trial: Any = copy.deepcopy(config)
        made = tried(model, trial, change)
        changed = {name for name in now if made.get(name) != now[name]}
        own = frozenset(name for name, one in left.items() if one.keys() <= changed)
        covered = {name for place in own for name in left[place]}
        if own and covered == changed and made == more(now, [left[name] for name in own]):
            left = {name: one for name, one in left.items() if name not in own}
            if len(own) > 1:
                yield own
