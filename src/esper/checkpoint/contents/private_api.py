"""What checkpoints use of torch that torch does not promise; read in torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, cast

from torch.optim import Optimizer

from esper.private_torch import demand

READ_IN = "2.13"


class _Indexed(Protocol):
    def _next_index(self) -> object: ...


def next_index(iterator: Iterator[object]) -> Callable[[], object]:
    """Return what draws a ``DataLoader``'s next indices and reads nothing.

    Raises:
        EsperError: This torch's loader draws them under another name.
    """
    demand(iterator, ("_next_index",), READ_IN, "going on in the middle of an epoch")
    return cast("_Indexed", iterator)._next_index


def mark_stepped(optimizer: Optimizer) -> None:
    """Tell schedulers that an optimizer has stepped, or one warns that it comes before the first step.

    It is written, never read: a torch without the name asks for nothing.
    """
    vars(optimizer)["_opt_called"] = True
