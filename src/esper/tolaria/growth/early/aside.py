"""Put large tensors aside: into a file without a name, mapped, so that a copy of a run takes no memory.

A run's weights and what Adam knows of them are three quarters of what training it needs; a copy in memory,
kept until an event is judged, would nearly double that.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LARGE = 2**26  # bytes from which on copies go to disk
MUCH = 2**26  # bytes of weights from which on memory that was freed goes back to the system
FORGET = 4  # MADV_DONTNEED of linux/mman.h
SOME = 2**24  # bytes of weights that were replaced, likewise: the optimizer's state goes with them
ALIGNED, BUFFER = 64, 2**20  # bytes
SPARE = 2  # times the bytes that the disk must have free


def copies(tensors: Sequence[Tensor], say: Callable[[str], None], kept: int = 0) -> tuple[list[Tensor], bool]:
    """Copy tensors: in memory, or mapped from the disk where they are large and it has room.

    The second value tells whether they are mapped.

    Args:
        tensors: To copy; their graphs are left behind.
        say: Called with why large ones stay in memory, and what that costs.
        kept: How many, the last, go to the host's memory; copies of the others stay where these are.
    """
    size = sum(one.numel() * one.element_size() for one in tensors)
    if size >= LARGE:
        folder = tempfile.gettempdir()
        try:
            if shutil.disk_usage(folder).free >= SPARE * size:
                return mapped([one.detach() for one in tensors]), True
            why = f"{folder} has less than {SPARE * size / 2**30:.1f} GiB free"
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter
            why = f"{folder} cannot be written: {type(error).__name__}: {error}"
        say(
            f"what an event may take back stays in memory, {size / 2**30:.1f} GiB until it is judged: {why}; "
            "set TMPDIR to a folder with room"
        )
    stay = len(tensors) - kept
    own = [one.detach().clone() for one in tensors[:stay]]
    return own + [one.detach().to("cpu", copy=True) for one in tensors[stay:]], False


def mapped(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Write tensors to a file, map it, and take its name away: it is gone once nobody holds them."""
    handle, path = tempfile.mkstemp(prefix="esper-")
    places = list[int]()
    try:
        with open(handle, "wb", buffering=BUFFER) as file:  # torch.save takes 100 µs for each, however small
            for one in tensors:
                places.append(file.seek(-(-file.tell() // ALIGNED) * ALIGNED))
                file.write(flat(one).view(torch.uint8).numpy().data)
            size = file.tell()
        whole = torch.from_file(path, shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0)
    finally:
        os.unlink(path)
    return [placed(whole, at, one) for at, one in zip(places, tensors, strict=True)]


def flat(tensor: Tensor) -> Tensor:
    """Return a tensor's numbers in the order of its memory."""
    dense = tensor.resolve_conj().resolve_neg()
    dense = (dense if keeps_layout(dense) else dense.contiguous()).cpu()
    return dense.as_strided((dense.numel(),), (1,))


def keeps_layout(tensor: Tensor) -> bool:
    """Tell whether a copy has the strides that a tensor has: there are no gaps in it."""
    return tensor.is_contiguous() or tensor.stride() == torch.empty_like(tensor, device="meta").stride()


def placed(whole: Tensor, at: int, like: Tensor) -> Tensor:
    """Return the tensor that was written at a place of a file, laid out as it was."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    numbers = whole[at : at + like.numel() * like.element_size()].view(like.dtype)
    return numbers.as_strided(like.shape, like.stride()) if keeps_layout(like) else numbers.view(like.shape)


@functools.cache
def page_advice() -> Callable[[int, int, int], int]:
    """Find the system's call; to look it up takes longer than the call."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return advise


def page_out(tensor: Tensor) -> None:
    """Let go of the pages of a mapped tensor that has been read: they are on the disk.

    They stay in the system's cache while it has room: to have them written off there, too, made the next
    look at them read the disk, four times as long.

    Args:
        tensor: From ``copies``, mapped; nobody has written to it, for that would be lost.
    """
    if sys.platform != "linux":
        return
    page = os.sysconf("SC_PAGE_SIZE")
    first = tensor.data_ptr() // page * page
    length = tensor.data_ptr() + tensor.numel() * tensor.element_size() - first
    page_advice()(first, length, FORGET)


def give_back() -> None:
    """Return memory that was freed to the system: glibc keeps the holes that smaller tensors leave."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
