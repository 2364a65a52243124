"""Reads files nobody vouches for: regular ones, up to a size, without ever waiting for a writer."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from esper.errors import EsperError
from esper.printable import quoted

CHUNK = 1 << 20
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_regular(
    path: str | Path, *, limit: int, what: str, error: type[EsperError], follow: bool = True
) -> bytes:
    """Return what a regular file holds.

    Args:
        path: Path of the file. A pipe, a device or a folder is refused, none of them is waited for.
        limit: Largest number of bytes; a larger file is refused, and never read whole.
        what: Name of the file in words, for the message.
        error: Class of the error raised.
        follow: True where the path may be a link; not where a run's folder should hold the file itself.

    Raises:
        EsperError: ``error``, with the reason the file cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags)
    except (OSError, ValueError, TypeError) as fault:
        raise error(f"cannot read {what} {_name(path)}: {_reason(fault, follow)}") from None
    try:
        return _content(handle, limit)
    except (OSError, _UnfitError) as fault:
        raise error(f"cannot read {what} {_name(path)}: {_reason(fault, follow)}") from None
    finally:
        os.close(handle)


class _UnfitError(EsperError):
    """Not a regular file, or too large."""


def _content(handle: int, limit: int) -> bytes:
    facts = os.fstat(handle)
    if not stat.S_ISREG(facts.st_mode):
        kind = KINDS.get(stat.S_IFMT(facts.st_mode), "something else")
        raise _UnfitError(f"it is {kind}; give a regular file")
    chunks: list[bytes] = []
    room = limit + 1 if facts.st_size <= limit else 0  # a file of holes is read for hours, into memory
    while room and (chunk := os.read(handle, min(CHUNK, room))):
        chunks.append(chunk)
        room -= len(chunk)
    if not room:
        raise _UnfitError(f"it has more than {limit:,} bytes, the most that is read")
    return b"".join(chunks)


def _name(path: object) -> str:
    return str(path) if isinstance(path, str | Path) and len(str(path)) <= 500 else quoted(path)


def _reason(fault: Exception, follow: bool) -> str:
    if isinstance(fault, OSError):
        if fault.errno == errno.ELOOP and not follow:
            return "it is a link; put the file itself there"
        return fault.strerror or str(fault)
    return str(fault)  # a path with a NUL, or of another type
