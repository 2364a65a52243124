"""What an event asks about: which places, and how many units at each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from esper.contracts import Site
from esper.kasmina.depth.stack import Stack
from esper.kasmina.evidence.growth_cost import GrowthCost
from esper.kasmina.widths.layers import in_size, out_size
from esper.kasmina.widths.places import Place, WidenPlace, gone
from esper.saving.ruled import Ties, ties
from esper.tamiyo.controller import RemainingBudget
from esper.tamiyo.early import allocate
from esper.tolaria.growth.early.timetable import Timetable
from esper.tolaria.growth.run.proven import Proven
from esper.tolaria.growth.run.state import RunState

WAITS = "it waits: blocks come first, as long as another fits the budget"
RACED = "a branch is raced beside its layer, which growth='incubate' does; this run widens and deepens"
WAITS_FOR_BLOCK = "it waits: a block comes, and the config gives all blocks one size"
WAITS_FOR_LATE = "it waits: blocks come at the last events"
NO_BLOCK_FITS = "the budget leaves no room for another block"


class Reach:
    """Says how far an event of one run may go.

    Args:
        run: What the run knows of itself.
        timetable: Of the run.
        proven: What the model was like when its places were proven.
    """

    def __init__(self, run: RunState, timetable: Timetable, proven: Proven) -> None:
        self.run, self.timetable, self.proven = run, timetable, proven
        self.settings = run.config.early
        self.resting: dict[str, str] = {}  # places that cannot learn at present, and why
        self.barred: dict[str, str] = {}  # places that are closed for the rest of the run, and why
        self.tied: tuple[object, Ties] = (
            None,
            (),
        )  # how the model was, and what a config then ruled together

    def places(self) -> dict[str, Place]:
        """Return the places an event asks at: where blocks can be added, wide ones stay as they are inside.

        Residual nets and transformers gained by depth and lost by inner width (char GPT, glyphs; see
        docs/decisions.md), but for what is narrower inside than the stream it writes to. Once no further
        block fits the budget, all widths are next.
        """
        self.barred.update(self.gone(self.run.morphable.places))
        self.resting = {**self.untrained(), **self.proven.refused(self.barred)}
        closed = {**self.resting, **self.barred}
        found = {n: p for n, p in self.run.morphable.places.items() if n not in closed}
        stacks = {n: p for n, p in found.items() if isinstance(p, Stack)}
        pairs = {n: p for n, p in found.items() if isinstance(p, WidenPlace)}
        if not stacks or not self.allocated(stacks, self.run.remaining_budget()):
            return {**pairs}
        inside = self.paths_of_blocks()
        widths: dict[str, Place] = {
            n: p for n, p in pairs.items() if not p.site.entry.startswith(inside) or lacking(p) > 0
        }
        return widths if 1 + len(self.timetable.due) > self.timetable.late else {**widths, **stacks}

    def left_out(self, free: Iterable[str]) -> dict[str, str]:
        """Return the places an event does not ask at, and why."""
        waiting = [name for name in self.run.morphable.places if name not in free]
        pairs = self.run.morphable.pairs
        stacks = {name: p for name, p in self.run.morphable.stacks.items() if name in waiting}
        later = WAITS_FOR_LATE if self.allocated(stacks, self.run.remaining_budget()) else NO_BLOCK_FITS
        waits = {name: later if name in stacks else WAITS if name in pairs else RACED for name in waiting}
        return {**waits, **self.resting, **self.barred}

    def paths_of_blocks(self) -> tuple[str, ...]:
        """Return how the path of what stands within a block of a stack begins.

        Where the blocks are children of the model itself, all else is, too: only what is theirs counts.
        """
        stacks = self.run.morphable.stacks.values()
        inside = [[stack.container] if stack.container else stack.names() for stack in stacks]
        return tuple(f"{path}." for paths in inside for path in paths)

    def gone(self, names: Iterable[str]) -> dict[str, str]:
        """Return the places of which a layer was replaced by hand, and which one."""
        places = self.run.morphable.places
        return gone(self.run.morphable.host, [places[name] for name in names if name in places])

    def untrained(self) -> dict[str, str]:
        """Return the places whose new units would not be trained: a layer is frozen, or its rate is nought.

        A fork is one as long as one of its consumers is trained.
        """
        optimizers = self.run.parts.optimizers.values()
        rates = {
            id(p): group["lr"] for one in optimizers for group in one.param_groups for p in group["params"]
        }
        found: dict[str, str] = {}
        for name, place in self.run.morphable.places.items():
            if not isinstance(place, WidenPlace):
                continue
            entry, *exits = zip((place.site.entry, *place.site.exits), place.ends(), strict=True)
            still = {path: why for path, layer in (entry, *exits) if (why := stands_still(layer, rates))}
            if entry[0] in still or len(still) == len(exits):
                path = next(iter(still))
                found[name] = f"{path} {still[path]}, and so would be what is added to it"
        return found

    def waits_for_depth(self, room: RemainingBudget) -> bool:
        """Tell whether blocks can be added at a later event."""
        return bool(self.timetable.due and self.allocated(self.run.morphable.stacks, room))

    def allocated(self, places: Mapping[str, Place], room: RemainingBudget) -> dict[str, int]:
        """Return the units each place gets: widths spend the budget before the last events.

        Where blocks can come at these, all events share it.
        """
        if room.events <= 0 or not places:
            return {}
        reserve = 0 if self.run.morphable.stacks else self.timetable.late
        left = min(max(1 + len(self.timetable.due) - reserve, 1), room.events)
        inside = self.paths_of_blocks()
        sites = [bounded(place, inside) for place in places.values()]
        cost = GrowthCost(self.run.morphable.host, places)
        return alike(allocate(sites, self.settings.factor, left, room, cost), self.together(places))

    def inserted(self, passed: Mapping[str, Place]) -> tuple[dict[str, int], list[str]]:
        """Return the units that places which have passed get now, and which wait for a block.

        A new block was drawn like the last one as that was looked at, and comes first; inside blocks that a
        config gives one size nothing becomes wider beside it.
        """
        units = self.allocated(passed, self.run.remaining_budget())
        inside, groups = self.paths_of_blocks(), self.together(passed)
        if not any(isinstance(passed[name], Stack) for name in units):
            return units, []
        tied = {name for group in groups for name in group if passed[name].site.entry.startswith(inside)}
        return {n: count for n, count in units.items() if n not in tied}, sorted(tied & units.keys())

    def together(self, names: Iterable[str]) -> Ties:
        """Return which of some places must stay equally wide, so that a config can say how wide they are.

        A set of which a member is missing is none: its config cannot follow any more.
        """
        run, asked = self.run, frozenset(names)
        now = len(run.plans), run.morphable.parameter_count()
        if self.tied[0] != now:
            with run.morphable.policy.uncompiled():
                self.tied = now, ties(run.morphable.host, run.morphable.pairs)
        return tuple(group for group in self.tied[1] if group <= asked)


def alike(units: Mapping[str, int], groups: Ties) -> dict[str, int]:
    """Give the places of a group the least that one of them gets; nothing where one gets nothing."""
    least = {name: min(units.get(one, 0) for one in group) for group in groups for name in group}
    return {name: count for name, given in units.items() if (count := least.get(name, given))}


def stands_still(layer: nn.Module, rates: Mapping[int, float]) -> str:
    """Say why a layer's weight does not learn; "" if it does."""
    weights = [p for p in layer.parameters(recurse=False) if p.dim() > 1]
    if weights and not any(p.requires_grad for p in weights):
        return "is frozen"
    known = [rates[id(p)] for p in weights if id(p) in rates]
    return "has a learning rate of 0" if known and not any(known) else ""


def bounded(place: Place, inside: tuple[str, ...]) -> Site:
    """Return a place's site: what is narrow inside a block becomes as wide as the stream, no wider.

    Args:
        place: Any.
        inside: How paths within blocks begin.
    """
    site = place.site
    if not site.entry.startswith(inside) or not isinstance(place, WidenPlace) or lacking(place) <= 0:
        return site
    groups = math.ceil(lacking(place) / site.granularity)
    return replace(site, most=groups * site.granularity)


def lacking(place: WidenPlace) -> int:
    """Return the units by which what a consumer reads is narrower than what it makes; of the widest."""
    read = [(out_size(one.consumer) - in_size(one.consumer)) // one.columns for one in place.outlets]
    return max(read)
