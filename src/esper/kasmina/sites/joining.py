"""Make one call of the three in which Hugging Face's ``Conv1D`` applies its weight: view, addmm, view."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from esper.kasmina.recording.recorder import Call, Recording, tensor_names
from esper.kasmina.widths.layers import is_conv1d

VIEWS = frozenset({"view", "reshape"})


def joined(recording: Recording, model: nn.Module) -> Recording:
    """Let every such layer read what it was called with and make what it returned, as a Linear does."""
    names = tensor_names(model)
    for module in model.modules():
        if is_conv1d(module):
            for index in recording.uses.get(names[id(module.weight)], []):
                join(recording, index)
    return recording


def join(recording: Recording, index: int) -> None:
    """Replace one addmm between two views."""
    call = recording.calls[index]
    if call.name != "addmm" or len(call.reads) != 1:
        return
    before, behind = recording.makers.get(call.reads[0]), set(recording.readers.get(call.makes[0], []))
    if before is None or len(behind) != 1:
        return
    first, (last_index,) = recording.calls[before], behind
    last = recording.calls[last_index]
    if first.name not in VIEWS or last.name not in VIEWS or len(first.reads) != 1 or len(last.reads) != 1:
        return
    given = (first.args[0], call.argument(2, "mat2"), call.argument(0, "input"))
    recording.calls[index] = Call(
        "linear", F.linear, given, {}, first.reads, last.makes, call.parameters, last.shape
    )
    readers = recording.readers[first.reads[0]]
    readers[readers.index(before)] = index
    del recording.readers[call.makes[0]]
    recording.makers[last.makes[0]] = index
