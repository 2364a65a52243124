"""What an event asks about: which places, and how many units at each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper.kasmina.growth_cost import GrowthCost
from esper.kasmina.places import Place, WidenPlace
from esper.kasmina.stack import Stack
from esper.tamiyo.controller import Room
from esper.tamiyo.early import allocate
from esper.tolaria.growth.timetable import Timetable


class Reach:
    """Says how far an event of one run may go.

    Args:
        growth: The conductor: ``morphable``, ``room``, ``config``.
        timetable: Of the run.
    """

    def __init__(self, growth: Any, timetable: Timetable) -> None:
        self.growth, self.timetable = growth, timetable
        self.settings = growth.config.early
        self.barred: dict[str, str] = {}  # places that are closed for the rest of the run, and why

    def places(self) -> dict[str, Place]:
        """Return the places an event asks at: where blocks can be added, what is inside them stays as it is.

        Residual nets and transformers gained by depth and lost by inner width (char GPT, glyphs; see
        docs/decisions.md); once no further block fits the budget, widths are next.
        """
        for name in self.growth.morphable.places:
            if why := self.gone(name):
                self.barred[name] = why
        found = {n: p for n, p in self.growth.morphable.places.items() if n not in self.barred}
        stacks = {n: p for n, p in found.items() if isinstance(p, Stack)}
        pairs: dict[str, Place] = {n: p for n, p in found.items() if isinstance(p, WidenPlace)}
        if not stacks or not self.allocated(stacks, self.growth.room()):
            return pairs
        inside = tuple(f"{stack.container}." for stack in stacks.values())
        outside: dict[str, Place] = {n: p for n, p in pairs.items() if not p.site.entry.startswith(inside)}
        return outside if 1 + len(self.timetable.due) > self.timetable.late else {**outside, **stacks}

    def gone(self, name: str) -> str:
        """Say so where a layer of a place is no longer the model's: it was replaced by hand."""
        host = {id(module) for module in self.growth.morphable.host.modules()}
        place = self.growth.morphable.places.get(name)
        if place is None:
            return ""
        ends = zip((place.site.entry, *place.site.exits), place.ends(), strict=True)
        lost = next((path for path, end in ends if id(end) not in host), None)
        return "" if lost is None else f"{lost} was replaced or removed since esper.grow"

    def waits_for_depth(self, room: Room) -> bool:
        """Tell whether blocks can be added at a later event."""
        return bool(self.timetable.due and self.allocated(self.growth.morphable.stacks, room))

    def allocated(self, places: Mapping[str, Place], room: Room) -> dict[str, int]:
        """Return the units each place gets."""
        if room.events <= 0 or not places:
            return {}
        left = min(1 + len(self.timetable.due), room.events)
        sites = [place.site for place in places.values()]
        cost = GrowthCost(self.growth.morphable.host, places)
        return allocate(sites, self.settings.factor, left, room, cost)
