"""What widenings cost together: two layers that both double have four times the weights between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from esper.kasmina.places import Place, WidenPlace


def growth_cost(model: nn.Module, places: Mapping[str, Place], units: Mapping[str, int]) -> tuple[int, int]:
    """Return the parameters and forward FLOPs per example that units add, all places at once.

    Args:
        model: The host.
        places: By name.
        units: To add, by name.
    """
    parameters = flops = 0
    shapes: dict[str, list[int]] = {}
    applied: dict[str, int] = {}  # positions per example at which a weight is used
    named = dict(model.named_parameters())
    for name, count in units.items():
        place = places[name]
        if not isinstance(place, WidenPlace):
            parameters += place.site.base_parameters + count * place.site.unit_parameters
            flops += count * place.site.unit_flops
            continue
        for edit in place.plan(count).edits:
            if edit.name in named:
                shape = shapes.setdefault(edit.name, list(named[edit.name].shape))
                shape[edit.axis] += edit.new - edit.old
                applied[edit.name] = positions(place, edit.name)
        flops += count * int(getattr(place, "step_flops", 0))
    for name, shape in shapes.items():
        added = math.prod(shape) - named[name].numel()
        parameters += added
        if len(shape) > 1:
            flops += 2 * added * applied[name]
    return parameters, flops


def positions(place: Any, name: str) -> int:
    """Return how often per example a weight of a place is used; what stands between counts by itself."""
    path = name.rpartition(".")[0]
    steps = [*getattr(place, "steps", ()), *getattr(place, "left", ()), *getattr(place, "right", ())]
    if path in {getattr(step, "name", "") for step in steps}:
        return 0
    before, behind = getattr(place, "places", None) or (getattr(place, "time", 1),) * 2
    return int(behind if path == place.site.exit else before)
