"""Norms and depthwise convolutions between two layers: calls that own something of every channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import nn

from esper.kasmina.recording.between import BatchNorm, Counted, Depthwise, GroupNorm, Step
from esper.kasmina.recording.recorder import Call, Recording, Refused
from esper.kasmina.widths.layers import CONVOLUTIONS, is_depthwise, out_size
from esper.printable import times

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
OWN = ("weight", "bias", "running_mean", "running_var")


class Known(Protocol):
    """What is known of a pass."""

    modules: dict[str, nn.Module]
    owners: dict[str, list[str]]  # of a parameter: the modules that hold it
    called: dict[str, list[Call]]
    recording: Recording

    def uses(self, parameter: str) -> Sequence[int]:
        """Return the calls a parameter was given to."""

    def calls_of(self, name: str) -> Sequence[Call]:
        """Return the calls of a layer."""


def layered(known: Known, call: Call, axis: int, name: str) -> Step:
    """Turn a call that owns parameters into a step.

    Args:
        known: Facts of the pass.
        call: Call that reads the output of a layer.
        axis: Axis of its channels.
        name: Name of the layer.
    """
    path = call.parameters[0].rpartition(".")[0]
    module = known.modules.get(path)
    label = f"{type(module).__name__} {path}".rstrip()
    owned = tuple(n for n in OWN if getattr(module, n, None) is not None)
    if any(len(known.owners[p]) > 1 for p in call.parameters):
        raise Refused(f"{path} between {name} and its consumer shares its tensors")
    by_channel(known, call, name, label)
    once(known, name, path, max(len(set(known.uses(p))) for p in call.parameters))
    if axis == 1 and isinstance(module, NORMS) and module.momentum is not None and call.name == "batch_norm":
        return BatchNorm(label, path, owned, module)
    if isinstance(module, NORMS) and module.momentum is None:
        raise Refused(
            f"{label} stands between {name} and its consumer and averages over all batches "
            "(momentum=None), where new channels would come late; give it a momentum"
        )
    if axis == 1 and isinstance(module, nn.GroupNorm) and call.name == "group_norm":
        return GroupNorm(label, path, owned, module)
    if axis == 1 and module is not None and is_depthwise(module):
        known.calls_of(path)
        return Depthwise(label, path, owned, module)
    raise Refused(
        f"{label} ({call.spoken}) stands between {name} and its consumer and mixes or owns channels"
    )


def by_channel(known: Known, call: Call, name: str, label: str) -> None:
    """Refuse a norm behind flatten: its features are positions of channels, and new ones come among them."""
    producer, read = known.modules.get(name), known.recording.shapes[call.reads[0]]
    if isinstance(producer, CONVOLUTIONS) and len(read) == 2 and read[1] != out_size(producer):
        raise Refused(
            f"{label} stands behind a flatten: of its {read[1]} features each is a position of one of the "
            f"{out_size(producer)} channels of {name}; put it before the flatten, with a feature per channel"
        )


def once(known: Known, name: str, path: str, calls: int) -> None:
    """Refuse what is not in every chain once: twice in one, it would grow twice."""
    runs = len(known.called.get(name, ())) or 1  # a recurrent layer has one, and none is kept
    if calls != runs:
        beside = f"; {name} is called {times(runs)}" if runs > 1 else ""
        raise Refused(
            f"{path} between {name} and its consumer is called {times(calls)}, or read elsewhere{beside}"
        )


def weightless(known: Known, call: Call, axis: int, name: str) -> Step | None:
    """Turn a call of a norm without tensors into a step; None of any other call.

    Args:
        known: Facts of the pass.
        call: Call that reads the output of a layer.
        axis: Axis of its channels.
        name: Name of the layer.
    """
    index = known.recording.makers.get(call.makes[0])
    path = known.recording.norms.get(-1 if index is None else index)
    if path is None or axis != 1 or call.name not in ("instance_norm", "batch_norm", "group_norm"):
        return None
    module = known.modules[path]
    theirs = [known.recording.calls[i].name for i, one in known.recording.norms.items() if one == path]
    once(known, name, path, theirs.count(call.name))
    label = f"{type(module).__name__} {path}"
    by_channel(known, call, name, label)
    if call.name == "group_norm":
        return GroupNorm(label, path, (), module)
    if call.name == "batch_norm":
        return BatchNorm(label, path, (), module)
    return Counted(call.name, call.func, call.args[1:], dict(call.kwargs), name=path, module=module)
