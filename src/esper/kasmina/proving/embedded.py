"""Where a tensor's entries are after some widenings: its own, and those that each widening brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esper.contracts import WidenEdit, WidenPlan

Key = tuple[str, str]  # a place, and the key of an edit in its plan


class Embedded:
    """Follows the axes of tensors through widenings.

    Args:
        tensors: As they are before, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.old: dict[str, list[Tensor]] = {}  # positions of the first entries, for tensors that grew
        self.new: dict[Key, tuple[WidenEdit, Tensor]] = {}
        self.along: dict[tuple[str, int], list[Key]] = {}  # keys of what was brought along an axis

    def note(self, site: str, plan: WidenPlan) -> None:
        """Follow one widening, carried out after those noted before."""
        for key, edit in plan.keyed():
            kept = moved(edit, torch.arange(edit.old))
            axes = self.old.setdefault(edit.name, [torch.arange(n) for n in self.shapes[edit.name]])
            axes[edit.axis] = kept[axes[edit.axis]]
            brought = self.along.setdefault((edit.name, edit.axis), [])
            for known in brought:
                other, where = self.new[known]
                self.new[known] = other, kept[where]
            fresh = torch.ones(edit.new, dtype=torch.bool)
            fresh[kept] = False
            self.new[site, key] = edit, fresh.nonzero().flatten()
            brought.append((site, key))

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """Return the entries that were there before."""
        return picked(tensor, self.old[name]) if name in self.old else tensor

    def slice_(self, key: Key, tensor: Tensor) -> Tensor:
        """Return the entries one edit brought, beside those there were before along all other axes."""
        return picked(tensor, self.axes(key))

    def put(self, key: Key, tensor: Tensor, value: Tensor) -> None:
        """Write these entries."""
        tensor[torch.meshgrid(*(one.to(tensor.device) for one in self.axes(key)), indexing="ij")] = value

    def axes(self, key: Key) -> list[Tensor]:
        """Return the positions of an edit's entries, axis by axis."""
        edit, where = self.new[key]
        axes = list(self.old[edit.name])
        axes[edit.axis] = where
        return axes


def moved(edit: WidenEdit, positions: Tensor) -> Tensor:
    """Return where entries are behind an edit: every chunk grows at its end."""
    before, after = edit.old // edit.chunks, edit.new // edit.chunks
    return positions // before * after + positions % before


def picked(tensor: Tensor, axes: Sequence[Tensor]) -> Tensor:
    """Return the entries at some positions of every axis."""
    for axis, where in enumerate(axes):
        if len(where) < tensor.shape[axis]:
            tensor = tensor.index_select(axis, where.to(tensor.device))
    return tensor
