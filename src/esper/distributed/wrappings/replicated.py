"""DistributedDataParallel, which averages the parameters it saw when it was made.

One that comes later is never averaged, without an error (measured). So the wrapper lets go of its parameters
before the layers change, and learns them anew.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esper.distributed.group import Group
from esper.distributed.model_wrapper import Optimizers, Wrapping
from esper.distributed.private_api import comm_hooks, has_python_reducer, reducer_off, require_ddp, waits_for
from esper.distributed.watchdog import Watchdog
from esper.errors import SiteError

__all__ = ["Replicated"]

STRUCTURE = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


class Replicated(Wrapping):
    """DistributedDataParallel: every process has all of the model.

    Args:
        wrapper: Wrapper of the user's; it is the same object afterwards, with another reducer inside.
        deadline: Seconds to wait for another process.

    Raises:
        SiteError: The wrapper has a part that cannot be made anew.
    """

    deferred = True

    def __init__(self, wrapper: DistributedDataParallel, deadline: float) -> None:
        require_ddp(wrapper)
        refuse_parts(wrapper)
        self.wrapper, self.group = wrapper, Group(wrapper.process_group, deadline)
        super().__init__(wrapper.module, self.group, Watchdog(wrapper.process_group, deadline))

    @contextmanager
    def reshaping(self, optimizers: Optimizers) -> Iterator[None]:
        """Take the reducer off the parameters, and put a new one on."""
        given = arguments(self.wrapper)
        self.host.zero_grad(set_to_none=True)  # they may be views of the reducer's buckets
        reducer_off(self.wrapper)
        try:
            yield
        finally:
            with self.group.waiting("a new wrapper"):
                renew(self.wrapper, given)


def refuse_parts(wrapper: DistributedDataParallel) -> None:
    """Refuse what a second reducer would not know of.

    Raises:
        SiteError: With what to leave out.
    """
    found = {
        "mixed_precision": wrapper.mixed_precision is not None,
        "delay_all_reduce_named_params": waits_for(wrapper),
        "the python reducer": has_python_reducer(wrapper),
    }
    for name, there in found.items():
        if there:
            raise SiteError(
                f"DistributedDataParallel with {name} cannot be told of new parameters; leave it out "
                "(autocast does for mixed precision)"
            )


def arguments(wrapper: DistributedDataParallel) -> dict[str, object]:
    """Return what a wrapper was made with; torch keeps each under its own name, with two exceptions."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    given = {
        name: getattr(wrapper, name)
        for name in (
            "device_ids",
            "output_device",
            "dim",
            "find_unused_parameters",
            "gradient_as_bucket_view",
            "static_graph",
            "batched_grad_copy",
            "skip_all_reduce_unused_params",
        )
        if name in known and hasattr(wrapper, name)
    }
    mesh = getattr(wrapper, "device_mesh", None)
    given |= {"process_group": wrapper.process_group} if mesh is None else {"device_mesh": mesh}
    synced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # since 2.13
    if not getattr(wrapper, synced):  # buffers are each process's own: the first sync would mix them
        given |= {synced: False, "init_sync": False}
    if not wrapper.bucket_bytes_cap_default:
        given["bucket_cap_mb"] = wrapper.bucket_bytes_cap / 2**20
    return given


def renew(wrapper: DistributedDataParallel, given: Mapping[str, object]) -> None:
    """Begin a wrapper again on the module it holds, in place: the user's variable stays valid."""
    kept = {name: wrapper.__dict__[name] for name in nn.Module().__dict__ if name not in STRUCTURE}
    hooks, syncing = comm_hooks(wrapper), wrapper.require_backward_grad_sync
    again: Callable[..., None] = DistributedDataParallel.__init__
    again(wrapper, wrapper.module, **given)
    wrapper.__dict__.update(kept)  # the hooks a user has put on the wrapper, and its mode
    wrapper.require_backward_grad_sync = syncing
    for hook, state in hooks:
        wrapper.register_comm_hook(state, hook)
