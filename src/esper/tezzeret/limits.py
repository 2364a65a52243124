"""What a build may use, and how the worker it runs in is held to it.

The kernel of the system holds memory, CPU time, file size and open files (rlimits, set before torch is
imported); the forge holds wall time and the resident memory of the worker with its children, from outside.
What is not held: the number of files and of processes. RLIMIT_NPROC counts every process of the user,
whoever started it, and does not bind root, so no number is right. Code that leaves the process group by
``setsid`` would outlive a kill; graphs are data and cannot ask for that.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esper.errors import ConfigError, ForgeError

MIB = 1 << 20
_NEW_USER, _NEW_NET = 0x10000000, 0x40000000  # <sched.h> CLONE_NEWUSER, CLONE_NEWNET
_SET_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38  # <sys/prctl.h>
_OUTWARD = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one worker may use.

    Attributes:
        wall: Seconds one build may take.
        cpu: Seconds of CPU time one build may take.
        memory: Bytes one process may allocate (RLIMIT_DATA; importing torch takes 180 MB); more is an error
            the worker survives. With its children and mapped files it may keep a quarter more resident, or is
            killed. RLIMIT_AS is not set: CUDA reserves far more addresses than it uses.
        file: Bytes of the largest file it may write.
        open_files: Files it may hold open.
        request: Bytes of the largest request.
        answer: Bytes of the largest kernel.
        start: Seconds a worker may take to start and warm up.
        niceness: Steps it stands behind training, 0 to 19.
    """

    wall: float = 120.0
    cpu: int = 120
    memory: int = 4096 * MIB
    file: int = 256 * MIB
    open_files: int = 512
    request: int = MIB // 2  # the largest valid graph is half of it; writing one takes 1 ms
    answer: int = 512 * MIB
    start: float = 120.0
    niceness: int = 10

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or name == "niceness")):
                raise ConfigError(f"Limits.{name} is {value}; it must be finite and greater than 0")

    @property
    def resident(self) -> int:
        """Bytes a worker and its children may keep resident."""
        return self.memory + self.memory // 4

    def enforce(self, parent: int) -> dict[str, str]:
        """Hold this process to the limits, for good; a worker calls it before it imports torch.

        Returns:
            By which means each is held.
        """
        hold(resource.RLIMIT_DATA, self.memory)
        hold(resource.RLIMIT_FSIZE, self.file)
        hold(resource.RLIMIT_NOFILE, self.open_files)
        hold(resource.RLIMIT_CORE, 0)
        os.nice(self.niceness)
        network = leave_network()
        memory = "RLIMIT_DATA"
        if sys.platform == "linux":
            # After the namespace, for new credentials clear the death signal.
            _libc().prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
            _libc().prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
            memory += ", resident memory watched"
        if os.getppid() != parent:  # it died before the death signal was set
            os._exit(1)
        return {"network": network, "memory": memory, "cpu": "RLIMIT_CPU", "file": "RLIMIT_FSIZE"}

    def begin_build(self) -> None:
        """Grant the next build its CPU time; RLIMIT_CPU counts from the process's start."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        hold(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + self.cpu, keep_hard=True)


def hold(kind: int, amount: int, keep_hard: bool = False) -> None:
    """Set one rlimit, never above what the process was given."""
    _, hard = resource.getrlimit(kind)
    soft = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (soft, hard if keep_hard else soft))


def leave_network() -> str:
    """Cut this process off the network; return by which means.

    A network namespace without interfaces, where the system permits one, holds native code and children too;
    an audit hook is added everywhere: it names what was refused, and reaches Unix sockets, which live in the
    file system. Where only the hook is in force, native code is not held.
    """
    uid, gid = os.getuid(), os.getgid()
    separate = sys.platform == "linux" and _libc().unshare(_NEW_USER | _NEW_NET) == 0
    if separate:  # files go on belonging to the same user
        try:
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{uid} {uid} 1"),
                ("gid_map", f"{gid} {gid} 1"),
            ):
                Path("/proc/self", name).write_text(text)
        except OSError:
            pass  # unmapped ids read as "nobody"; nothing here asks for them
    sys.addaudithook(refuse_network)
    return "namespace and audit hook" if separate else "audit hook"


def refuse_network(event: str, given: tuple[object, ...]) -> None:
    """Refuse every outward use of a socket.

    Raises:
        ForgeError: The event is one.
    """
    if event in _OUTWARD:
        raise ForgeError(f"ran into its limits: {event} was called, and a build has no network")


def environment(folder: Path, cache: Path | None, given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables a worker sees: those torch and a compiler need, and no secrets."""
    allowed = {
        "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "CC", "CXX",
        "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "ATEN_CPU_CAPABILITY",
    }  # fmt: skip
    return {name: value for name, value in given.items() if name in allowed} | {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # or Inductor starts processes of its own
        "TORCHINDUCTOR_CACHE_DIR": str(cache or folder / "inductor"),
    }


def resident(pid: int) -> int | None:
    """Return the bytes a process and its children keep resident; None where that cannot be read."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as file:
            total = int(file.read().split()[1]) * resource.getpagesize()
        with open(f"/proc/{pid}/task/{pid}/children", "rb") as file:
            children = file.read().split()
    except (OSError, IndexError):
        return None
    return total + sum(resident(int(child)) or 0 for child in children)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
