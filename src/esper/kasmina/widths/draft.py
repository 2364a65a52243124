"""Write a widening down: which tensors of the host grow, by which of a kernel, and what counts them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from esper.contracts import WidenEdit, WidenPlan
from esper.kasmina.recording.between import Step
from esper.kasmina.widths.layers import bias_of, grown_inputs, grown_outputs, in_axis, out_axis, stored_weight


def edit(name: str, axis: int, tensor: Tensor, added: int, source: str, chunks: int = 1) -> WidenEdit:
    """Describe one tensor's growth."""
    return WidenEdit(name, axis, tensor.shape[axis], tensor.shape[axis] + added, source, chunks)


class Draft:
    """A plan on its way; sources are the names of a kernel's tensors.

    Args:
        site: Name of the place.
        units: Number of units to add.
    """

    def __init__(self, site: str, units: int) -> None:
        self.site, self.units = site, units
        self.edits: list[WidenEdit] = []
        self.attributes: list[tuple[str, str, int]] = []

    def rows(self, role: str, path: str, layer: nn.Module, each: int = 1, chunks: int = 1) -> None:
        """Let a layer make the units, in some rows each; these come in as many chunks."""
        weight, added = f"{path}.weight", self.units * each
        self.edits.append(
            edit(weight, out_axis(layer), stored_weight(layer), added, f"{role}_weight", chunks)
        )
        bias = bias_of(layer)
        if bias is not None:
            self.edits.append(edit(f"{path}.bias", 0, bias, added, f"{role}_bias", chunks))
        self.attributes += grown_outputs(path, layer, added)

    def steps(self, role: str, steps: Iterable[Step]) -> None:
        """Let them pass steps, one after the other."""
        for index, step in enumerate(steps):
            self.between(f"{role}_{index}", step)

    def between(self, role: str, step: Step) -> None:
        """Let them pass a step."""
        for own, host in step.grows():
            self.edits.append(edit(host, 0, step.tensors()[own], self.units, f"{role}_{own}"))
        self.attributes += step.attributes(self.units)

    def columns(self, source: str, path: str, layer: nn.Module, each: int, chunks: int = 1) -> None:
        """Let a layer read them, in some columns each; these come in as many chunks."""
        added = self.units * each
        self.edits.append(edit(f"{path}.weight", in_axis(layer), stored_weight(layer), added, source, chunks))
        self.attributes += grown_inputs(path, layer, added)

    def plan(self) -> WidenPlan:
        """Return the plan."""
        return WidenPlan(self.site, self.units, tuple(self.edits), tuple(self.attributes))
