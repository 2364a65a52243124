"""Penalties on the size of weights: reads that end in the loss and nowhere else hide no place.

A sum of norms over ``model.parameters()`` reads every weight of a model. Widening moves it, as it should; the
outputs stay.
"""

from __future__ import annotations

from esper.kasmina.recording.recorder import Recording

REDUCING = frozenset(  # what turns weights into a penalty on their size
    "norm vector_norm linalg_vector_norm linalg_norm square abs pow __pow__ mul __mul__ sum mean flatten "
    "view reshape cat stack detach float to dot".split()
)


def is_penalty(recording: Recording, index: int) -> bool:
    """Tell a read of weights that ends in a scalar and, with it, in the loss: ``p.norm()`` for every p."""
    todo, derived, shapes = [index], set[int](), recording.shapes
    while todo:
        call = recording.calls[todo.pop()]
        own = set(call.reads) <= derived and call.name in REDUCING
        scalars = all(shapes[v].numel() == 1 for v in call.reads) and not any(shapes[v] for v in call.makes)
        joined = call.name in {"stack", "cat"} and all(len(shapes[v]) == 1 for v in call.makes)
        if not call.makes and call.shape is not None and call.name in REDUCING:
            continue  # a vector flattened is itself
        if not call.makes or not (own or joined or (derived and scalars)):
            return False
        for value in call.makes:
            if shapes[value] and value in recording.outputs:
                return False
            derived.add(value)
            todo.extend(recording.readers.get(value, []))
    return True
