"""``Place``: what the race, the gate and the layer need of any spot where something can grow.

A pair widens the user's own layers, a fork does so where several of them read one; a block gets a kernel
beside it (parallel) or behind it (serial).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol, Self, runtime_checkable

from torch import nn

from esper.blueprints.kernel import LiveKernel
from esper.contracts import Site, WidenPlan
from esper.kasmina.widths.outlets import Outlet


class Place(Protocol):
    """A site with the host's own modules at hand."""

    @property
    def site(self) -> Site:
        """The plain facts."""

    @property
    def port(self) -> Literal["parallel", "serial"]:
        """Whether a kernel reads the entry's input or the exit's output."""

    def ends(self) -> tuple[nn.Module, ...]:
        """Return the module whose input is tapped, then those whose output is added to.

        There is one of these, but for a fork, which has several. A race adds its branch to one output of one
        call, so it takes no forks, nor layers that a pass calls several times.
        """

    def kernel(self, units: int) -> LiveKernel:
        """Build a fresh kernel; random weights come from torch's global stream."""


@runtime_checkable
class WidenPlace(Place, Protocol):
    """A place whose kernel becomes part of the user's own layers."""

    @property
    def outlets(self) -> tuple[Outlet, ...]:
        """The layers that get columns, as ``ends`` has them."""

    def used(self) -> Mapping[str, float]:
        """Map layers to the positions per example at which they run; what stands between is not listed."""

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` are added."""

    def refreshed(self) -> Self:
        """Return the place with its layers' facts as they are now."""


def gone(model: nn.Module, places: Iterable[Place]) -> dict[str, str]:
    """Return the places of which a layer is no longer in the model, and which one."""
    missing = {place.site.name: name for place in places for name in lost(model, place)[:1]}
    return {place: f"{name} was replaced or removed since esper.grow" for place, name in missing.items()}


def lost(model: nn.Module, place: Place) -> list[str]:
    """List the ends of a place that are no longer in the model."""
    ends = list(zip((place.site.entry, *place.site.exits), place.ends(), strict=True))
    if all(at(model, path) is end for path, end in ends):  # the usual answer, without a look at every module
        return []
    held = {id(module) for module in model.modules()}
    return [path for path, end in ends if id(end) not in held]


def at(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path; None where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
