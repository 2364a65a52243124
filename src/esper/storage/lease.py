"""A lease on a folder: it has one holder at a time, and ends with the process that holds it."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import socket
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from esper.errors import RunError
from esper.files import read_regular

MOST = 1 << 16  # bytes it may say
LEASE_FILE = ".lease"  # who holds it, for messages; the lock is on the open file, not in what it says
_held: weakref.WeakSet[Lease] = weakref.WeakSet()


class Lease:
    """Holds a folder until it is released, its owner is forgotten or the process dies.

    Args:
        folder: Path; created where nothing is, and removed again if nothing was put into it.
        other: Words for what to give instead where somebody else holds it: "another run_dir".

    Raises:
        RunError: Somebody else holds it; the message says who.
        OSError: It cannot be written, or its file system has no locks.
    """

    def __init__(self, folder: str | Path, other: str) -> None:
        self.folder = Path(folder)
        self.path = Path(os.path.abspath(folder)) / LEASE_FILE  # the process may go elsewhere
        self.made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = self._locked()
        if handle is None and holder(self.path).get("pid") == os.getpid():
            gc.collect()  # a run of this process that was given up, in a cycle of references
            handle = self._locked()
        if handle is None:
            raise RunError(f"{_as_seen(self.folder)} is in use by {described(holder(self.path), other)}")
        self.handle = handle
        self.release = weakref.finalize(self, _release, handle, self.path, os.getpid(), self.made)
        _held.add(self)
        with suppress(OSError):  # a full disk: held all the same, by nobody knows whom
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
            os.pwrite(handle, json.dumps(facts).encode(), 0)

    def _locked(self) -> int | None:
        """Lock the file that is there, not one that its last holder removed meanwhile; None: it is held."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same(handle, self.path):
                    os.ftruncate(handle, 0)
                    return handle
            except OSError as error:
                os.close(handle)
                if error.errno == errno.EWOULDBLOCK:
                    return None
                raise
            os.close(handle)


def holder(path: Path) -> dict[str, object]:
    """Read who holds a lease; nothing where it does not say."""
    with suppress(OSError, ValueError):
        facts = json.loads(read_regular(path, limit=MOST, what="the lease", error=RunError))
        return facts if isinstance(facts, dict) else {}
    return {}


def described(facts: Mapping[str, object], other: str) -> str:
    """Say who holds a lease, and what to do."""
    cure = f"wait for it, end it, or give {other}"
    pid, host, since = facts.get("pid"), facts.get("host"), facts.get("since")
    if not (isinstance(pid, int) and isinstance(host, str) and isinstance(since, int | float)):
        return f"another process, which does not say which; {cure}"
    mine = pid == os.getpid() and host == socket.gethostname()
    begun = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(min(max(since, 0), 1e11)))
    if mine:
        return f"this process, since {begun}; finish() or close() what holds it, or give {other}"
    return f"another process, {pid} on {host[:80]!r}, since {begun}; {cure}"


def _as_seen(folder: Path) -> Path:
    """Return a path as whoever stands in the present folder writes it."""
    with suppress(OSError, ValueError):  # it is not below, or the present folder is gone
        return folder.relative_to(Path.cwd())
    return folder


def _same(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def _release(handle: int, path: Path, owner: int, made: bool) -> None:
    if os.getpid() != owner:  # a child that was forked has a copy of this object, and no lease
        return
    with suppress(OSError):
        if _same(handle, path):
            path.unlink()
    os.close(handle)
    if made:
        with suppress(OSError):  # something is in it
            path.parent.rmdir()


def _forget() -> None:
    """Close a forked child's copies: a lock lives as long as any of them does."""
    for lease in list(_held):
        lease.release.detach()
        with suppress(OSError):
            os.close(lease.handle)


os.register_at_fork(after_in_child=_forget)
