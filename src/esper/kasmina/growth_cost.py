"""What widenings cost together: two layers that both double have four times the weights between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from esper.kasmina.places import Place, WidenPlace


@dataclass(frozen=True, slots=True)
class Growing:
    """How one parameter follows the units of a place."""

    name: str
    axis: int
    each: int  # entries along the axis per group of units
    positions: float  # per example at which it is used


class GrowthCost:
    """Counts what units add, all places at once; asked some two dozen times at an event.

    Args:
        model: The host.
        places: By name.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place]) -> None:
        self.places = dict(places)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.growing: dict[str, list[Growing]] = {}
        for name, place in self.places.items():
            if isinstance(place, WidenPlace):
                used = place.used()  # what stands between counts its FLOPs by itself
                self.growing[name] = [
                    Growing(edit.name, edit.axis, edit.new - edit.old, used.get(owner(edit.name), 0))
                    for edit in place.plan(place.site.granularity).edits
                    if edit.name in self.shapes
                ]

    def __call__(self, units: Mapping[str, int]) -> tuple[int, int]:
        """Return the parameters and forward FLOPs per example that units add.

        Args:
            units: By place, in whole groups.
        """
        parameters = flops = 0
        shapes: dict[str, list[int]] = {}
        used: dict[str, float] = {}
        for name, count in units.items():
            site = self.places[name].site
            if name not in self.growing:
                parameters += site.base_parameters + count * site.unit_parameters
                flops += count * site.unit_flops
                continue
            for one in self.growing[name]:
                shape = shapes.setdefault(one.name, list(self.shapes[one.name]))
                shape[one.axis] += one.each * (count // site.granularity)
                used[one.name] = one.positions
            flops += count * int(getattr(self.places[name], "step_flops", 0))
        for name, shape in shapes.items():
            added = math.prod(shape) - math.prod(self.shapes[name])
            parameters += added
            if len(shape) > 1:
                flops += round(2 * added * used[name])
        return parameters, flops


def owner(name: str) -> str:
    """Return the path of the module that holds a parameter."""
    return name.rpartition(".")[0]
