"""Settings of torch's compiler: they hold for the whole process, so a run that changes one puts it back."""

from __future__ import annotations

import threading
import weakref

import torch

LOCK = threading.RLock()  # a collection of garbage inside may let another holder leave
ORIGINAL: dict[str, int] = {}  # by name, as it was before the first run changed it
HOLDERS: dict[str, set[int]] = {}  # by name, the policies that still need it


def change(name: str, value: int, holder: object) -> None:
    """Change a setting; it is put back once every holder has left it, or is gone."""
    with LOCK:
        ORIGINAL.setdefault(name, getattr(torch._dynamo.config, name))
        holders = HOLDERS.setdefault(name, set())
        if id(holder) not in holders:
            holders.add(id(holder))
            weakref.finalize(holder, leave, name, id(holder))
        setattr(torch._dynamo.config, name, value)


def original(name: str) -> int:
    """Return a setting as it was before any run changed it."""
    return ORIGINAL.get(name, getattr(torch._dynamo.config, name))


def leave(name: str, holder: int) -> None:
    """Put a setting back, if this is the last that holds it.

    Args:
        name: Name in ``torch._dynamo.config``.
        holder: Identity of what held it.
    """
    with LOCK:
        holders = HOLDERS.get(name, set())
        holders.discard(holder)
        if not holders and name in ORIGINAL:
            setattr(torch._dynamo.config, name, ORIGINAL.pop(name))
