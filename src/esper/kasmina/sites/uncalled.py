"""Layers that the probe did not call, and that may read what would be widened: a head for another task."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from esper.contracts import Refusal
from esper.kasmina.widths.layers import in_size, is_depthwise, is_layer, out_size
from esper.kasmina.widths.places import Place, WidenPlace

UNCALLED = "was not called by the probe"


def not_read_elsewhere(
    model: nn.Module, found: Sequence[Place], refusals: Sequence[Refusal]
) -> tuple[list[Place], list[Refusal]]:
    """Leave out places whose new units a layer might read that has not run yet.

    The user's forward would fail on the first batch that takes it there. An uncalled layer that has another
    uncalled one in front of it, as those of an expert have, reads that.
    """
    silent = uncalled(model, refusals)
    made = [out_size(layer) for layer in silent.values()]
    waiting = {name: in_size(layer) for name, layer in silent.items() if in_size(layer) not in made}
    kept: list[Place] = []
    barred: list[Refusal] = []
    for place in found:
        widths = widths_of(place)
        reader = next((name for name, size in waiting.items() if size in widths), None)
        if reader is None:
            kept.append(place)
            continue
        reason = (
            f"{reader} was not called, and takes as many inputs as {place.site.entry} makes; let the first "
            f"batch of the probe (example=, where it streams) use all such layers, each for some rows, or "
            f"name {place.site.name} in sites= if it reads something else"
        )
        barred.append(Refusal(place.site.entry, reason))
    return kept, barred


def uncalled(model: nn.Module, refusals: Sequence[Refusal]) -> dict[str, nn.Module]:
    """List the layers that did not run."""
    modules = dict(model.named_modules())
    names = [one.place for one in refusals if one.reason == f"{one.place} {UNCALLED}"]
    layers = {name: modules[name] for name in names if trained(modules[name])}  # not a copy that follows
    return {name: layer for name, layer in layers.items() if is_layer(layer) and not is_depthwise(layer)}


def trained(layer: nn.Module) -> bool:
    """Tell a layer that learns."""
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def widths_of(place: Place) -> set[int]:
    """Return how wide what a place widens may come to a reader: in units, or in positions of them."""
    if not isinstance(place, WidenPlace):
        return set()
    return {place.site.width, *(place.site.width * outlet.columns for outlet in place.outlets)}
