"""Where a tensor's entries are after some widenings: its own, and those that each widening brought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from esper.contracts import WidenEdit, WidenPlan

Key = tuple[str, str]  # a place, and the key of an edit in its plan
Positions: TypeAlias = "range | Tensor"  # along one axis; a range where they stand together


class Embedded:
    """Follows the axes of tensors through widenings.

    Args:
        tensors: Tensors as they are before, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.old: dict[str, list[Positions]] = {}  # positions of the first entries, for tensors that grew
        self.new: dict[Key, tuple[WidenEdit, Positions]] = {}
        self.along: dict[tuple[str, int], list[Key]] = {}  # keys of what was brought along an axis

    def note(self, site: str, plan: WidenPlan) -> None:
        """Follow one widening, carried out after those noted before."""
        for key, edit in plan.keyed():
            whole: list[Positions] = [range(n) for n in self.shapes[edit.name]]
            axes = self.old.setdefault(edit.name, whole)
            brought = self.along.setdefault((edit.name, edit.axis), [])
            fresh: Positions = range(edit.old, edit.new)  # behind all others, which stay where they are
            if edit.chunks > 1:
                kept = moved(edit, torch.arange(edit.old))
                axes[edit.axis] = kept[spread(axes[edit.axis])]
                for known in brought:
                    other, where = self.new[known]
                    self.new[known] = other, kept[spread(where)]
                left = torch.ones(edit.new, dtype=torch.bool)
                left[kept] = False
                fresh = left.nonzero().flatten()
            self.new[site, key] = edit, fresh
            brought.append((site, key))

    def own(self, name: str, tensor: Tensor) -> Tensor:
        """Return the entries that were there before."""
        return picked(tensor, self.old[name]) if name in self.old else tensor

    def slice_(self, key: Key, tensor: Tensor) -> Tensor:
        """Return the entries one edit brought, beside those there were before along all other axes."""
        return picked(tensor, self.axes(key))

    def put(self, key: Key, tensor: Tensor, value: Tensor) -> None:
        """Write these entries."""
        places = self.axes(key)
        if all(isinstance(one, range) for one in places):
            picked(tensor, places).copy_(value)  # a view; by indices it takes three times as long
            return
        axes = [spread(one).to(tensor.device) for one in places]
        tensor[torch.meshgrid(*axes, indexing="ij")] = value

    def axes(self, key: Key) -> list[Positions]:
        """Return the positions of an edit's entries, axis by axis."""
        edit, where = self.new[key]
        axes = list(self.old[edit.name])
        axes[edit.axis] = where
        return axes


def moved(edit: WidenEdit, positions: Tensor) -> Tensor:
    """Return where entries are behind an edit: every chunk grows at its end."""
    before, after = edit.old // edit.chunks, edit.new // edit.chunks
    return positions // before * after + positions % before


def spread(positions: Positions) -> Tensor:
    """Write out positions."""
    if isinstance(positions, Tensor):
        return positions
    return torch.arange(positions.start, positions.stop)


def picked(tensor: Tensor, axes: Sequence[Positions]) -> Tensor:
    """Return the entries at some positions of every axis."""
    for axis, where in enumerate(axes):
        if len(where) == tensor.shape[axis]:
            continue
        if isinstance(where, range):
            tensor = tensor.narrow(axis, where.start, len(where))
        else:
            tensor = tensor.index_select(axis, where.to(tensor.device))
    return tensor
