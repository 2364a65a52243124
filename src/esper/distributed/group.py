"""``Group``: growth's conversation between processes, over torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from esper.errors import ProcessError


class Group:
    """The processes that train one model together; see ``esper.distributed.collectives.Peers``.

    Numbers travel in a gloo group of their own, with a deadline of their own: a lost process is noticed after
    that, not after the half hour that torch allows. Tensors travel where the model's gradients do.

    Args:
        process_group: Group that averages the model's gradients; None: all processes.
        deadline: Seconds to wait for the others.

    Raises:
        ProcessError: Another process did not come.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, deadline: float = 30.0) -> None:
        self.tensors = process_group
        self.rank, self.world = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.deadline = deadline
        with self.waiting("a group of their own"):
            self.numbers = gloo_group(process_group, deadline)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Say in Esper's words that the others did not answer."""
        try:
            yield
        except RuntimeError as error:  # torch's errors of all backends are its children
            raise ProcessError(
                f"process {self.rank} of {self.world} waited for {what}, and another process was lost, or "
                f"slower than {self.deadline:g} s: {error}; start the run again with --resume auto "
                "(torchrun --max-restarts does)"
            ) from error

    def route(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """Return the group that can carry a tensor."""
        return self.numbers if tensor.device.type == "cpu" else self.tensors

    def all_reduce_mean(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over all processes, in place: one all-reduce per dtype and device."""
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for alike in kinds.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])  # (numbers,)
            with self.waiting("a mean"):
                dist.all_reduce(flat, group=self.route(flat))
            spread(flat.div_(self.world), alike)

    def broadcast_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Write rank 0's values into every process's tensors."""
        for tensor in tensors:
            flat = tensor.detach().reshape(-1).contiguous()  # (numbers,)
            with self.waiting("rank 0's tensors"):
                dist.broadcast(flat, group=self.route(flat), group_src=0)
            spread(flat, [tensor])

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Join every process's rows, in the order of ranks; their number may differ."""
        counts = [count for (count,) in self.all_gather_ints([len(tensor)])]
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])  # (most rows, …)
        padded[: len(tensor)] = tensor.detach()
        found = [torch.empty_like(padded) for _ in counts]
        with self.waiting("each other's rows"):
            dist.all_gather(found, padded, group=self.route(padded))
        return torch.cat([rows[:count] for rows, count in zip(found, counts, strict=True)])  # (all rows, …)

    def broadcast_floats(self, numbers: Sequence[float]) -> list[float]:
        """Return rank 0's numbers."""
        record = torch.tensor(numbers, dtype=torch.float64)
        with self.waiting("rank 0's word"):
            dist.broadcast(record, group=self.numbers, group_src=0)
        return record.tolist()

    def all_ranks(self, holds: bool) -> bool:
        """Tell whether something holds in every process."""
        return all(answer for (answer,) in self.all_gather_ints([int(holds)]))

    def all_gather_ints(self, record: Sequence[int]) -> list[list[int]]:
        """Return every process's record of 64-bit whole numbers, in the order of ranks."""
        own = torch.tensor(record, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.world)]
        with self.waiting("each other's records"):
            dist.all_gather(found, own, group=self.numbers)
        return [one.tolist() for one in found]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Return every process's bytes on rank 0, nothing elsewhere."""
        joined = self.all_gather_rows(octets(data))
        sizes = [size for (size,) in self.all_gather_ints([len(data)])]
        return [part.numpy().tobytes() for part in joined.split(sizes)] if self.rank == 0 else []

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Return rank 0's bytes."""
        (size,) = (int(number) for number in self.broadcast_floats([len(data)]))
        buffer = torch.zeros(size, dtype=torch.uint8)
        if self.rank == 0:
            buffer.copy_(octets(data))
        self.broadcast_tensors([buffer])
        return buffer.numpy().tobytes()


def gloo_group(process_group: dist.ProcessGroup | None, deadline: float) -> dist.ProcessGroup:
    """Make a group of the same processes that carries small tensors on the CPU; collective.

    Args:
        process_group: Group whose processes take part; None: all.
        deadline: Seconds a collective waits.
    """
    ranks = None if process_group is None else dist.get_process_group_ranks(process_group)
    made = dist.new_group(
        ranks, timeout=timedelta(seconds=deadline), backend="gloo", use_local_synchronization=True
    )
    return cast("dist.ProcessGroup", made)  # none of these is a process outside the group


def octets(data: bytes) -> Tensor:
    """Return bytes as a tensor; torch reads no empty buffer."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def spread(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write a flat tensor back into those it was made of."""
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
