"""Which recipe a run grows by."""

from __future__ import annotations

from typing import Any, Literal

from esper.kasmina.places import WidenPlace

Recipe = Literal["early", "incubate", "off"]
FROZEN = 0.5  # of the parameters; a host of which more stands still is adapted, not grown


def recipe_of(growth: Any) -> Recipe:
    """Return the recipe the settings name, or the one that suits the host.

    Early growth trains old and new units together, so it is for models that are trained as a whole. A frozen
    host cannot follow, and a branch that fits nowhere in its layers has to prove itself beside them: both
    are raced.
    """
    chosen: Literal["auto", "early", "incubate", "off"] = growth.config.growth
    if chosen != "auto":
        return chosen
    host = growth.morphable.host
    sizes = [(p.numel(), p.requires_grad) for p in host.parameters()]
    frozen = sum(n for n, trains in sizes if not trains) / max(sum(n for n, _ in sizes), 1)
    widens = any(isinstance(place, WidenPlace) for place in growth.morphable.places.values())
    return "early" if widens and frozen <= FROZEN else "incubate"
