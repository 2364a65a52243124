"""What Esper uses of DistributedDataParallel's insides, and torch's walk over nested batches.

Read in torch 2.13; 2.11 is the oldest torch Esper runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from esper.private_torch import demand

READ_IN = "2.13"
DDP = (
    "_delay_all_reduce_params _use_python_reducer _comm_hooks reducer logger bucket_bytes_cap "
    "bucket_bytes_cap_default require_backward_grad_sync"
).split()
Tree = TypeVar("Tree")


def require_ddp(wrapper: DistributedDataParallel) -> None:
    """Ask for every name by which a wrapper is begun again.

    Raises:
        EsperError: This torch lacks one.
    """
    demand(wrapper, DDP, READ_IN, "growing inside DistributedDataParallel")


def waits_for(wrapper: DistributedDataParallel) -> bool:
    """Tell whether a wrapper delays the all-reduce of some parameters."""
    return bool(wrapper._delay_all_reduce_params)


def has_python_reducer(wrapper: DistributedDataParallel) -> bool:
    """Tell whether a wrapper reduces in Python, under the compiler."""
    return wrapper._use_python_reducer


def comm_hooks(wrapper: DistributedDataParallel) -> list[tuple[Callable[..., object], object]]:
    """Return a wrapper's communication hooks, each with its state."""
    return wrapper._comm_hooks


def reducer_off(wrapper: DistributedDataParallel) -> None:
    """Take the reducer off; the logger holds on to it, and its hooks to the parameters."""
    for name in ("reducer", "logger"):
        setattr(wrapper, name, None)


def tree_map(leaf: Callable[[object], object], tree: Tree) -> Tree:
    """Return nested containers with every leaf replaced; their shape stays.

    Raises:
        EsperError: This torch walks trees otherwise.
    """
    demand(_pytree, ("tree_map",), READ_IN, "splitting batches between processes")
    return _pytree.tree_map(leaf, tree)
