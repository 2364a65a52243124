"""Compare what two forms of a host said: results, gradients, and the gradients of new units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.kasmina.proving.embedded import Key

SMALL = 2**14  # numbers of a tensor up to which it is measured together with others
FLOOR = (
    0.05  # of all gradients together; what is left of a smaller one may be rounding (a bias before BatchNorm)
)


@dataclass
class Numbers:
    """What one form of the host said."""

    results: list[Tensor]
    gradients: dict[str, Tensor]  # of the host's own parameters
    slices: dict[Key, Tensor]  # of what units consist of


def unlike(before: Numbers, after: Numbers, within: float) -> str:
    """Compare two forms; returns what differs, "" if nothing does.

    Args:
        before: Units beside the host.
        after: Units in its layers.
        within: Largest relative difference that rounding may make.
    """
    if [r.shape for r in before.results] != [r.shape for r in after.results]:
        return "the results have another shape"
    if differ(before.results, after.results, within, 0.0):
        return "the results differ"
    names, own = list(before.gradients), list(before.gradients.values())
    lengths = norms(own)
    floor = FLOOR * math.hypot(*lengths)
    if found := differ(own, [after.gradients[name] for name in names], within, floor, lengths):
        return f"the gradients of {names[found[0]]} differ"
    keys = [key for key, one in before.slices.items() if same_shape(one, after.slices.get(key))]
    slices = [before.slices[key] for key in keys], [after.slices[key] for key in keys]
    if found := differ(*slices, within, floor):
        return f"the gradients of new units in {keys[found[0]][1]} differ"
    return ""


def same_shape(one: Tensor, other: Tensor | None) -> bool:
    """Tell gradients that can be compared; a recurrent layer's rows and columns grow together."""
    return other is not None and one.shape == other.shape


def differ(
    before: Sequence[Tensor],
    after: Sequence[Tensor],
    within: float,
    floor: float,
    lengths: Sequence[float] | None = None,
) -> list[int]:
    """List the tensors that differ by more than rounding; what is not finite at first says nothing.

    Args:
        before: Tensors as they should be.
        after: Tensors of the same shapes.
        within: Relative to the larger of a tensor's length
        floor: and this.
        lengths: Norms of the first tensors, where they are known.
    """
    apart = norms([one - other for one, other in zip(before, after, strict=True)])
    sizes = norms(before) if lengths is None else lengths
    alike = [off <= within * max(own, floor) + 1e-12 for own, off in zip(sizes, apart, strict=True)]
    return [index for index, own in enumerate(sizes) if math.isfinite(own) and not alike[index]]


def norms(all_: Sequence[Tensor]) -> list[float]:
    """Return the length of each tensor, in as many reads as there are devices."""
    found = [0.0] * len(all_)
    alike: dict[tuple[object, ...], list[int]] = {}  # small ones of a shape are measured together
    for index, one in enumerate(all_):
        if one.numel():
            own = None if one.numel() <= SMALL else index
            alike.setdefault((one.shape, one.dtype, one.device, own), []).append(index)
    groups = list(alike.values())
    lengths = [lengths_of([all_[index].detach() for index in group]) for group in groups]
    read = torch.cat([one.to(lengths[0].device) for one in lengths]).tolist() if lengths else []
    for index, length in zip([index for group in groups for index in group], read, strict=True):
        found[index] = length
    return found


def lengths_of(alike: Sequence[Tensor]) -> Tensor:
    """Return the lengths of tensors of one shape, (tensors,), double."""
    whole = alike[0][None] if len(alike) == 1 else torch.stack(list(alike))
    whole = torch.view_as_real(whole) if whole.is_complex() else whole
    return torch.linalg.vector_norm(whole.reshape(len(whole), -1), dim=1, dtype=torch.float64)
