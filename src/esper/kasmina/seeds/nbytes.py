"""How many bytes a live value takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from esper.errors import KernelError


def nbytes(value: object) -> int:
    """Count the bytes a value takes, every storage once, however many tensors share it.

    Tensors, the parameters and buffers of modules, ``bytes`` and nests of these are counted. Anything else
    must state its size as ``nbytes``; a module may, for what it holds beside its tensors.

    Raises:
        KernelError: A part says nothing of its size.
    """
    storages: dict[int, int] = {}
    return _stated(value, storages) + sum(storages.values())


def _stated(value: object, storages: dict[int, int]) -> int:
    """Return the bytes that parts of a value state; the storages of its tensors are collected."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        return 0
    if isinstance(value, bytes | bytearray | str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_stated(part, storages) for part in value.values())
    if isinstance(value, Sequence):
        return sum(_stated(part, storages) for part in value)
    stated = getattr(value, "nbytes", None)
    if isinstance(value, nn.Module):
        for tensor in (*value.parameters(), *value.buffers()):
            _stated(tensor, storages)
        return stated if isinstance(stated, int) else 0
    if not isinstance(stated, int):
        raise KernelError(f"a {type(value).__name__} says nothing of its bytes; give the cache a size_of")
    return stated
