"""A small disk of the rehearsal's own, which can really run full or become read-only.

``python -m esper.chaos.disk FOLDER BYTES`` mounts a tmpfs in a mount namespace of its own (and a user
namespace, where it is not root) and holds it until its input ends. Other processes join. Nobody outside sees
the disk, and it is gone with the last process that uses it, however that ends.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path

from esper.errors import RunError

NEWNS, NEWUSER = 0x00020000, 0x10000000
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18  # of mount(2)
DETACH = 2  # of umount2(2)
FILLER = "filler"
BLOCK = 1 << 16


def hold(folder: str, size: int) -> int:
    """Mount, say so, and wait; in a process of its own."""
    try:
        _apart()
        _mount(b"tmpfs", Path(folder), 0, size)
    except (RunError, OSError) as error:
        print(error, flush=True)
        return 1
    print("held", flush=True)
    sys.stdin.read()
    return 0


class Disk:
    """Holds a disk while it is open.

    Raises:
        RunError: This system lets nobody here mount one; the message says what it said.
    """

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "esper.chaos.disk", str(folder), str(size)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline().strip()
        if said != "held":
            self.close()
            raise RunError(f"no disk can be mounted here: {said or 'mount namespaces are not supported'}")

    def close(self) -> None:
        """Let go of it."""
        self.process.communicate()


def join(holder: int) -> None:
    """Enter the namespace of a process that holds a disk; before any thread is started.

    Raises:
        RunError: The process is gone, or not ours.
    """
    try:
        if os.stat(f"/proc/{holder}/ns/user").st_ino != os.stat("/proc/self/ns/user").st_ino:
            _enter(f"/proc/{holder}/ns/user")
        here = os.getcwd()
        _enter(f"/proc/{holder}/ns/mnt")
        os.chdir(here)
    except OSError as error:
        raise RunError(f"cannot join the disk of process {holder}: {error.strerror}") from None


def fill(folder: Path) -> None:
    """Write until there is no room."""
    handle = os.open(folder / FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        while True:
            os.write(handle, bytes(BLOCK))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(handle)


def free(folder: Path) -> None:
    """Make room again."""
    (folder / FILLER).unlink(missing_ok=True)


def freeze(folder: Path) -> None:
    """Make a folder read-only, for root too: a mount over itself.

    Files that are open for writing stay so; no file system can be remounted while there are some.
    """
    _mount(os.fsencode(folder), folder, BIND)
    _mount(None, folder, REMOUNT | READ_ONLY | BIND)


def thaw(folder: Path) -> None:
    """Make it writable again."""
    _must(_libc().umount2(os.fsencode(folder), DETACH))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _apart() -> None:
    """Leave the mounts of everybody else; as another user than root that takes a user namespace."""
    libc, user, group = _libc(), os.getuid(), os.getgid()
    if libc.unshare(NEWNS):
        _must(libc.unshare(NEWNS | NEWUSER))
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
    _must(libc.mount(None, b"/", None, RECURSIVE | PRIVATE, None))


def _enter(path: str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _must(_libc().setns(handle, 0))
    finally:
        os.close(handle)


def _mount(source: bytes | None, folder: Path, flags: int, size: int | None = None) -> None:
    kind, data = (None, None) if size is None else (b"tmpfs", f"size={size}".encode())
    _must(_libc().mount(source, os.fsencode(folder), kind, ctypes.c_ulong(flags), data))


def _must(failed: int) -> None:
    if failed:
        number = ctypes.get_errno()
        raise RunError(f"the system refuses: {os.strerror(number)}")


if __name__ == "__main__":
    sys.exit(hold(sys.argv[1], int(sys.argv[2])))
