"""Between two layers: calls that leave out, reorder or reduce axes other than that of the channels.

``out[:, -1]`` behind a recurrent layer, ``x.mean(1)`` over time, ``x.transpose(1, 2)`` before a convolution:
what becomes of a channel does not depend on the others, only the place of the axis changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.recording.between import Replay
from esper.kasmina.recording.recorder import Call

REDUCE = frozenset({"mean", "sum", "amax", "amin", "max", "min"})


@dataclass(frozen=True)
class Moved:
    """A step, and where channels and examples are behind it."""

    step: Replay
    axis: int
    batch: int


def moved(call: Call, before: Sequence[int], axis: int, batch: int) -> Moved | None:
    """Turn a call into a step that moves axes; None where it is no such call, or touches these two."""
    if call.parameters or len(call.reads) != 1 or not call.args or not isinstance(call.args[0], Tensor):
        return None
    dims = len(before)
    if call.name == "__getitem__":
        return selected(call, dims, axis, batch)
    if call.name in {"transpose", "swapaxes", "swapdims", "permute"}:
        return reordered(call, dims, axis, batch)
    if call.name == "squeeze" and isinstance(call.argument(1, "dim"), int):
        gone = {int(call.argument(1, "dim")) % dims}
        replay = Replay("squeeze", torch.squeeze, (*gone,))
        if call.shape is not None and len(call.shape) == dims:
            gone = set()  # the axis is longer than 1: nothing goes
        return left_out(replay, gone, axis, batch)
    if call.name == "unsqueeze":
        spot = int(call.argument(1, "dim")) % (dims + 1)
        return Moved(
            Replay("unsqueeze", torch.unsqueeze, (spot,)), axis + (spot <= axis), batch + (spot <= batch)
        )
    if call.name in REDUCE:
        return reduced(call, dims, axis, batch)
    return None


def selected(call: Call, dims: int, axis: int, batch: int) -> Moved | None:
    """``x[:, -1]``, ``x[..., 0, :]``: positions or ranges, of axes that are neither channels nor batch."""
    key = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if not all(part is ... or type(part) in (int, slice) for part in key):
        return None
    if ... in key:
        spot = key.index(...)
        key = (*key[:spot], *[slice(None)] * (dims - len(key) + 1), *key[spot + 1 :])
    parts = dict(enumerate(key))
    if any(parts.get(a, slice(None)) != slice(None) for a in (axis, batch)):
        return None
    gone = {a for a, part in parts.items() if isinstance(part, int)}
    return left_out(Replay("__getitem__", Tensor.__getitem__, (tuple(key),)), gone, axis, batch)


def reordered(call: Call, dims: int, axis: int, batch: int) -> Moved | None:
    """``x.transpose(1, 2)``, ``x.permute(1, 0, 2)``."""
    given = [*call.args[1:], *call.kwargs.values()]
    flat = [int(d) % dims for part in given for d in (part if isinstance(part, (tuple, list)) else (part,))]
    order = list(range(dims))
    if call.name == "permute":
        order = flat
    else:
        one, two = flat
        order[one], order[two] = two, one
    if sorted(order) != list(range(dims)):
        return None
    return Moved(Replay("permute", torch.permute, (tuple(order),)), order.index(axis), order.index(batch))


def reduced(call: Call, dims: int, axis: int, batch: int) -> Moved | None:
    """``x.mean(1)``, ``x.max(1).values``: over axes that are neither channels nor batch."""
    given, kept = call.argument(1, "dim"), bool(call.argument(2, "keepdim", False))
    over = (given,) if type(given) is int else given
    if set(call.kwargs) - {"dim", "keepdim"}:
        return None
    if not isinstance(over, (tuple, list)) or not over or not all(type(d) is int for d in over):
        return None
    gone = {d % dims for d in over}
    if gone & {axis, batch}:
        return None
    name = {"max": "amax", "min": "amin"}.get(call.name, call.name)
    func: Any = getattr(torch, name)
    step = Replay(name, func, (tuple(sorted(gone)), kept))
    return left_out(step, set() if kept else gone, axis, batch)


def left_out(step: Replay, gone: set[int], axis: int, batch: int) -> Moved | None:
    """Count the axes in front that are gone."""
    if gone & {axis, batch}:
        return None
    return Moved(step, axis - sum(a < axis for a in gone), batch - sum(a < batch for a in gone))


def examples(shape: Sequence[int], batch: int, axis: int) -> int:
    """Count positions per example."""
    return math.prod(size for a, size in enumerate(shape) if a not in (batch, axis))
