"""Which recipe a run grows by."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from esper.config import Config
from esper.errors import ConfigError, nearest
from esper.kasmina.depth.stack import Stack
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.widths.places import WidenPlace
from esper.printable import quoted

Recipe = Literal["early", "incubate", "off"]
Choice = Literal["auto", "early", "incubate", "off"]
FROZEN = 0.5  # of the parameters; a host of which more stands still is adapted, not grown


def with_growth(settings: Config, growth: str | None) -> Config:
    """Return the settings with the recipe that a call names; None leaves theirs.

    Raises:
        ConfigError: No such recipe; the nearest is named.
    """
    if growth is None:
        return settings
    if not isinstance(growth, str) or growth not in get_args(Choice):
        raise ConfigError(f"unknown growth {quoted(growth)}; {nearest(quoted(growth), get_args(Choice))}")
    return settings.model_copy(update={"growth": growth})


def recipe_of(chosen: Choice, model: MorphableModel) -> Recipe:
    """Return the recipe the settings name, or the one that suits the host.

    Early growth trains old and new units together, so it is for models that are trained as a whole. A frozen
    host cannot follow, and a branch that fits nowhere in its layers has to prove itself beside them: both
    are raced.
    """
    if chosen != "auto":
        return chosen
    grows = any(isinstance(place, WidenPlace | Stack) for place in model.places.values())
    return "early" if grows and trained_whole(model.host) else "incubate"


def is_raced(chosen: Choice, host: nn.Module) -> bool:
    """Tell before the places are known whether a race has to be able to take them.

    It takes no layer with several consumers or several calls. Where a race would be chosen only because
    nothing can be widened, these count: they can be.
    """
    return chosen == "incubate" or (chosen == "auto" and not trained_whole(host))


def trained_whole(host: nn.Module) -> bool:
    """Tell a model that is trained as a whole, or nearly so."""
    sizes = [(p.numel(), p.requires_grad) for p in host.parameters()]
    frozen = sum(n for n, trains in sizes if not trains) / max(sum(n for n, _ in sizes), 1)
    return frozen <= FROZEN
