"""Lets optimizers follow a widening: the state of the old units bit for bit, the new units by a rule.

A widened parameter keeps its identity (see ``surgery/widen_layers.py``), so its state stays under its key and
only becomes larger. ``step`` is kept: a fresh one would undo the old units' bias correction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, SupportsFloat, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.contracts import WidenEdit
from esper.errors import SurgeryError
from esper.surgery.optimizers.foreign import NESTS, follows_weights
from esper.surgery.optimizers.history import cleared, forget, remembers
from esper.surgery.optimizers.kinds import Kind, kind_of
from esper.surgery.widen_layers import Change, extend

Rule: TypeAlias = Literal["zeros", "seed", "mean"]
Donor: TypeAlias = Mapping[str, Mapping[str, object]]  # key of a slice -> state key -> state of that slice


def widen_state(
    optimizers: Mapping[str, Optimizer],
    changes: Iterable[Change],
    rule: Rule = "zeros",
    donor: Donor | None = None,
) -> list[str]:
    """Enlarge the state of widened parameters, and follow those that changed identity.

    Call it when the widening has been checked. Either all optimizers are changed or none.

    Args:
        optimizers: Optimizers, by name; a parameter that none of them owns, as a frozen one, is passed over.
        changes: Parameters that became larger, as ``surgery.widen_layers`` returned them.
        rule: State of the new units: as at birth (``zeros``), the mean of the old units (``mean``), or what
            the incubating seed's own optimizer had learned (``seed``). What birth is, and where it is the
            mean, says ``kinds.py``.
        donor: State that ``seed`` takes over, by key of a slice (``plan.keyed()``) and of the state.

    Returns:
        One line for each tensor that ``seed`` gave nothing fitting for and that was filled as at birth, and
        for each optimizer that lost its history.

    Raises:
        SurgeryError: An optimizer holds state of an unknown kind.
    """
    reasons: list[str] = []
    larger: list[tuple[Optimizer, list[nn.Parameter], Change, dict[str, object]]] = []
    anew: dict[str, Optimizer] = {}
    for change in changes:
        given = donor or {} if rule == "seed" else None
        for name, optimizer in optimizers.items():
            group = _group_of(optimizer, change.previous)
            if group is None:
                continue
            state: dict[str, object] = {}
            if kind_of(optimizer).history:
                anew[name] = optimizer
            else:
                state = _Enlarging(kind_of(optimizer), group, change, rule, given, reasons).state(
                    name, optimizer
                )
            larger.append((optimizer, cast("list[nn.Parameter]", group["params"]), change, state))
    for optimizer, members, change, state in larger:
        _commit(optimizer, members, change, state)
    for name, optimizer in anew.items():
        reasons += [cleared(name, optimizer)] if remembers(optimizer) else []
        forget(optimizer)
    return reasons


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> Mapping[str, object] | None:
    for group in optimizer.param_groups:
        if any(mine is parameter for mine in group["params"]):
            return group
    return None


def same(value: object) -> object:
    """Leave a leaf as it is."""
    return value


def mapped(
    change: Callable[[Tensor], object], value: object, rest: Callable[[object], object] = same
) -> object:
    """Return a nest of containers with its tensors changed.

    Args:
        change: Makes what takes a tensor's place.
        value: Tensor, dict, list, tuple, or a leaf.
        rest: Makes what takes any other leaf's place.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: mapped(change, one, rest) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        made = [mapped(change, one, rest) for one in value]
        if isinstance(value, list):
            return made
        remake = getattr(value, "_make", tuple)  # of a named tuple, whose names the user reads
        return remake(made)
    return rest(value)


@dataclass(frozen=True)
class _Enlarging:
    """What one optimizer knows of one parameter, about to become larger; nothing is changed yet.

    Attributes:
        kind: What is known of the optimizer's class.
        group: The parameter's group, with its settings.
        change: Of the parameter.
        rule: State of the new units.
        given: What a seed's own optimizer had learned; None: nothing is taken from one.
        reasons: Lines on what was filled as at birth; more are added.
    """

    kind: Kind
    group: Mapping[str, object]
    change: Change
    rule: Rule
    given: Donor | None
    reasons: list[str]

    def state(self, name: str, optimizer: Optimizer) -> dict[str, object]:
        """Return what changes in the parameter's state."""
        state: dict[str, object] = {}
        known = optimizer.state.get(self.change.previous, {})
        where = f"{type(optimizer).__name__} {name!r}: state {{!r}} of {self.change.edit.name!r}"
        for key, value in known.items() if isinstance(known, dict) else ():
            larger = partial(self.tensor, key, where.format(key))
            if isinstance(value, Tensor):
                found = larger(value)
                state |= {} if found is value else {key: found}
            elif isinstance(value, NESTS):
                state[key] = mapped(larger, value)
        return state

    def tensor(self, key: str, where: str, old: Tensor) -> Tensor:
        """Return a tensor of the state, larger; itself where it is a counter."""
        kind, change = self.kind, self.change
        shape = list(change.parameter.shape)
        for edit in change.edits:
            shape[edit.axis] = edit.old
        reduced = kind.reduced[key] % change.parameter.dim() if key in kind.reduced else None
        if reduced is not None:
            shape[reduced] = 1
        if not _is_elementwise(old, shape, where):
            return old
        weights = _before(change)
        copied = old.shape == weights.shape and follows_weights(key, old, weights)
        for number, edit in enumerate(change.edits):
            if reduced == edit.axis:  # a mean over the grown axis stays
                continue
            new = _new_part(change, edit) if copied else self.units(key, old, edit)
            if self.given is not None:
                slot = edit.name if number == 0 else f"{edit.name}@{edit.axis}"
                new = _from_seed(self.given.get(slot, {}).get(key), new, where, self.reasons)
            old = extend(old, new, edit.axis, edit.chunks)
        return old

    def units(self, key: str, old: Tensor, edit: WidenEdit) -> Tensor:
        """Return the state of an edit's new units."""
        axis, count = edit.axis, edit.new - edit.old
        if key == self.kind.average:
            return _new_part(self.change, edit)
        if self.rule == "mean" or self.kind.padded:
            means = [part.mean(axis, keepdim=True) for part in old.chunk(edit.chunks, axis)]
            each = [-1 if a != axis else count // edit.chunks for a in range(old.dim())]
            return torch.cat([mean.expand(each) for mean in means], axis)  # (…, count, …)
        setting = self.kind.born.get(key)
        born = float(cast("SupportsFloat", self.group[setting])) if setting else 0.0
        unit = torch.full_like(old.narrow(axis, 0, 1), born)  # (…, 1, …)
        shape = list(old.shape)
        shape[axis] = count
        return unit.expand(shape)  # (…, count, …)


def _is_elementwise(old: Tensor, shape: list[int], where: str) -> bool:
    """Tell state that grows with the parameter from counters; refuse what is neither."""
    if old.dim() == 0:
        return False
    if type(old) is Tensor and list(old.shape) == shape:
        return True
    if old.numel() == 1:
        return False
    raise SurgeryError(
        f"{where} is a {type(old).__name__} of shape {tuple(old.shape)}, the parameter's was {tuple(shape)}; "
        "only state with one number per weight can be widened: use another optimizer for what may grow"
    )


def _before(change: Change) -> Tensor:
    """Return a parameter without what its edits added."""
    part = change.parameter.detach()
    for edit in reversed(change.edits):
        part = _halves(part, edit)[0]
    return part


def _new_part(change: Change, edit: WidenEdit) -> Tensor:
    """Return what one edit added to a parameter, without what later ones did."""
    part = change.parameter.detach()
    for later in change.edits[change.edits.index(edit) + 1 :]:
        part = _halves(part, later)[0]
    return _halves(part, edit)[1]


def _halves(tensor: Tensor, edit: WidenEdit) -> tuple[Tensor, Tensor]:
    """Take an edit's old and new part apart again."""
    old, new = edit.old // edit.chunks, (edit.new - edit.old) // edit.chunks
    parts = tensor.split([old, new] * edit.chunks, edit.axis)  # old, new, old, new, … along the axis
    return torch.cat(parts[::2], edit.axis), torch.cat(parts[1::2], edit.axis)


def _from_seed(given: object, otherwise: Tensor, where: str, reasons: list[str]) -> Tensor:
    if isinstance(given, Tensor) and given.shape == otherwise.shape:
        return given
    found = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else "nothing"
    reasons.append(f"{where}: the seed has {found} for {tuple(otherwise.shape)}; filled as at birth")
    return otherwise


def _commit(
    optimizer: Optimizer, members: list[nn.Parameter], change: Change, state: dict[str, object]
) -> None:
    if change.previous in optimizer.state:
        optimizer.state[change.previous].update(state)
    if change.replaced is not None:
        members[:] = [change.parameter if p is change.replaced else p for p in members]
        if change.replaced in optimizer.state:
            optimizer.state[change.parameter] = optimizer.state.pop(change.replaced)
