"""What widenings cost together: two layers that both double have four times the weights between them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from esper.kasmina.widths.places import Place, WidenPlace


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
        places: Places, by name.
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
            units: Numbers of units by place, in whole groups.
        """
        parameters = flops = 0
        shapes: dict[str, list[int]] = {}
        used: dict[str, float] = {}
        for name in units.keys() & self.growing.keys():
            place, count = self.places[name], units[name]
            for one in self.growing[name]:
                shape = shapes.setdefault(one.name, list(self.shapes[one.name]))
                shape[one.axis] += one.each * (count // place.site.granularity)
                used[one.name] = one.positions
            flops += count * int(getattr(place, "step_flops", 0))
        added = {name: math.prod(shape) - math.prod(self.shapes[name]) for name, shape in shapes.items()}
        worked = {
            name: round(2 * new * used[name]) if len(shapes[name]) > 1 else 0 for name, new in added.items()
        }
        for name in units.keys() - self.growing.keys():
            site, count = self.places[name].site, units[name]
            inside = [one for one in added if one.startswith(f"{site.exit}.")] if site.kind == "stack" else []
            each = site.unit_parameters + sum(added[one] for one in inside)  # a copy of what it will be
            parameters += site.base_parameters + count * each
            flops += count * (site.unit_flops + sum(worked[one] for one in inside))
        return parameters + sum(added.values()), flops + sum(worked.values())


def owner(name: str) -> str:
    """Return the path of the module that holds a parameter."""
    return name.rpartition(".")[0]
