"""Objects of which nothing is known but that they hold tensors: graphs, say, or a user's own batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from esper.batches.layout import Leaf

DEEP = 3  # objects keep their tensors in tables within stores within themselves
SHOWN = 4


def tensors_of(value: object, name: str = "", depth: int = DEEP) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors in an object's attributes, by name."""
    if isinstance(value, Tensor):
        if name:  # it is an attribute
            yield name, value
    elif depth and not isinstance(value, nn.Module):
        try:
            held = dict(value) if isinstance(value, Mapping) else dict(getattr(value, "__dict__", {}))
        except Exception:  # it is the user's own object: what it does not show is not known
            return
        for key, one in held.items():
            yield from tensors_of(one, str(key), depth - 1)


def with_rows(leaf: Leaf, count: int) -> bool:
    """Tell an object with a row for each example: it would have to be cut with them."""
    return any(one.dim() > 0 and one.size(0) == count for _, one in tensors_of(leaf))


def described(leaf: Leaf) -> str:
    """Say what kind of object it is, and which tensors it holds."""
    names = [name for name, _ in tensors_of(leaf)]
    more = " …" if len(names) > SHOWN else ""
    return f"{type(leaf).__name__} ({', '.join(names[:SHOWN])}{more})" if names else type(leaf).__name__
