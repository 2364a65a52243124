"""Activations written by hand: elementwise calls that part and meet again, as in ``x * sigmoid(x)``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from esper.kasmina.recording.between import ELEMENTWISE, Composite, Part, Slot
from esper.kasmina.recording.recorder import Call, Recording, Refused


def region(recording: Recording, start: int, name: str, readers: Sequence[Call]) -> tuple[Composite, int]:
    """Follow a value with several readers until a single value is left.

    Args:
        recording: The run.
        start: The value.
        name: Name of the layer it comes from, for the reason.
        readers: Calls that read the value: all, or those of one branch.

    Returns:
        The step, and the value it makes.

    Raises:
        Refused: The readers do more than elementwise calls that meet again.
    """
    names = ", ".join(call.spoken for call in readers)
    many = f"has {len(readers)} consumers" if len(readers) > 1 else "meets itself"
    why = f"the output of {name} {many} ({names})"  # kept as an error it would hold this frame
    slots, parts = {start: Slot(0)}, list[Part]()
    # Other branches' readers of the value are none of this one's business.
    done = {r for r in recording.readers.get(start, []) if all(recording.calls[r] is not c for c in readers)}
    while True:
        ahead = {v: sorted(set(recording.readers.get(v, [])) - done) for v in slots}
        open_ = [v for v, calls in ahead.items() if calls]
        if not open_ or not recording.outputs.isdisjoint(slots):
            raise Refused(why)
        if parts and len(open_) == 1 and slots[open_[0]].index == len(parts):
            label = "+".join(dict.fromkeys(part.label.strip("_") for part in parts))
            return Composite(label, tuple(parts)), open_[0]
        index = min(calls[0] for calls in ahead.values() if calls)
        call = recording.calls[index]
        alone = call.name in ELEMENTWISE and not call.parameters and set(call.reads) <= set(slots)
        if not alone or len(call.makes) != 1 or call.shape != recording.shapes[start]:
            raise Refused(why)
        given = iter([slots[r] for r in call.reads])
        leaves, shape = tree_flatten((call.args, call.kwargs))
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, shape)
        parts.append(Part(call.name, args, kwargs))
        slots[call.makes[0]] = Slot(len(parts))
        done.add(index)
