"""Write a widening down: which tensors of the host grow, by which of a kernel, and what counts them."""

from __future__ import annotations

from typing import Any

from esper.contracts import WidenEdit, WidenPlan
from esper.kasmina.recording.between import Step
from esper.kasmina.widths.layers import grown_inputs, grown_outputs, in_axis, out_axis


def edit(name: str, axis: int, tensor: Any, added: int, source: str, chunks: int = 1) -> WidenEdit:
    """Describe one tensor's growth."""
    return WidenEdit(name, axis, tensor.shape[axis], tensor.shape[axis] + added, source, chunks)


class Draft:
    """A plan on its way; sources are the names of a kernel's tensors.

    Args:
        site: Name of the place.
        units: To add.
    """

    def __init__(self, site: str, units: int) -> None:
        self.site, self.units = site, units
        self.edits: list[WidenEdit] = []
        self.attributes: list[tuple[str, str, int]] = []

    def rows(self, role: str, path: str, layer: Any) -> None:
        """Let a layer make the units."""
        weight = f"{path}.weight"
        self.edits.append(edit(weight, out_axis(layer), layer.weight, self.units, f"{role}_weight"))
        if layer.bias is not None:
            self.edits.append(edit(f"{path}.bias", 0, layer.bias, self.units, f"{role}_bias"))
        self.attributes += grown_outputs(path, layer, self.units)

    def between(self, role: str, step: Step) -> None:
        """Let them pass a step."""
        for own, host in step.grows():
            self.edits.append(edit(host, 0, step.tensors()[own], self.units, f"{role}_{own}"))
        self.attributes += step.attributes(self.units)

    def columns(self, source: str, path: str, layer: Any, each: int) -> None:
        """Let a layer read them, in some columns each."""
        added = self.units * each
        self.edits.append(edit(f"{path}.weight", in_axis(layer), layer.weight, added, source))
        self.attributes += grown_inputs(path, layer, added)

    def plan(self) -> WidenPlan:
        """Return the plan."""
        return WidenPlan(self.site, self.units, tuple(self.edits), tuple(self.attributes))
