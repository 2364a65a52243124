"""Join the processes that torchrun has started, and leave them."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def launched() -> bool:
    """Tell whether torchrun, or something that speaks like it, has started several of this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join() -> tuple[int, int]:
    """Join the other processes, unless that was done already, as on a Ray cluster.

    Returns:
        This one's rank, and how many there are.
    """
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    # torchrun keeps one store for all its attempts; under the same keys the processes of the second would be
    # sent to the addresses of the first, which are dead ("connectFullMesh failed … Connection refused").
    store, rank, world = next(dist.rendezvous("env://"))
    own = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=world)
    return rank, world


def replicated(model: nn.Module) -> DistributedDataParallel:
    """Wrap a model whose gradients the processes average."""
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def leave(code: int = 0) -> None:
    """Leave the other processes and end this one.

    A plain exit aborts now and then after all work is done ("terminate called without an active exception":
    2 of 7 runs, none of 15 this way), and torchrun takes that for a failure.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
