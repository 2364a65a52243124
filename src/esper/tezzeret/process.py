"""The forge's side of one worker process: starting it, talking to it, watching it, killing it."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time as clock
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from esper.errors import ForgeError
from esper.tezzeret import wire
from esper.tezzeret.limits import MIB, Limits, environment, resident

TICK = 0.05  # seconds between two looks at a build; a look costs 40 µs
_TAIL = 1500  # characters of a dead worker's error stream that are told


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that ended without an answer."""

    reason: str
    again: bool  # whether another try may end otherwise: not where a limit was hit


class Worker(Protocol):
    """What a forge needs of a worker; one thread calls everything but :meth:`stop`."""

    held: dict[str, str]  # by which means each limit is in force
    peak: int | None  # resident bytes during the last build

    def start(self) -> Death | None:
        """Be ready for a request, or say why not."""

    def forge(self, frame: bytes) -> wire.Frame | Death:
        """Answer a request; start first where that is needed."""

    def stop(self, reason: str | None) -> None:
        """End the build and begin none, until stopped with None; from any thread."""

    def close(self) -> None:
        """Leave nothing behind."""


class WorkerProcess:
    """One worker at a time; a dead one is replaced when it is next needed.

    All methods but :meth:`stop` belong to one thread, and that thread must outlive the worker: Linux sends
    the death signal when the thread that started a process ends.
    """

    def __init__(self, build: str, warm: str | None, limits: Limits, cache: Path | None) -> None:
        self.build, self.warm, self.limits, self.cache = build, warm, limits, cache
        self.held: dict[str, str] = {}
        self.peak: int | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._stopped: str | None = None
        self._lock = threading.Lock()  # a process is never signalled once it was reaped

    def forge(self, frame: bytes) -> wire.Frame | Death:
        """Send a request, starting a worker if there is none; return its answer or how it ended."""
        if (death := self.start()) is not None:
            return death
        answer = self._exchange(frame, self.limits.wall, f"{self.limits.wall:g} s of wall time")
        if self.peak is not None and self.peak > self.limits.memory // 2:
            self.close()  # what it leaked would be charged to the next build
        return answer

    def start(self) -> Death | None:
        """Start a worker and wait until it has warmed up; nothing happens where one is alive."""
        if self._process is not None and not self._ended():
            return None
        self.close()
        try:
            self._spawn()
        except OSError as error:
            return Death(f"no worker could be started: {error}", again=True)
        hello = {"build": self.build, "warm": self.warm, "limits": asdict(self.limits), "parent": os.getpid()}
        ready = self._exchange(wire.pack(hello), self.limits.start, f"{self.limits.start:g} s to start")
        if isinstance(ready, Death):
            return ready
        header, _ = ready
        if "ready" not in header:
            self.close()
            return Death(f"could not start: {header['error']['message']}", again=False)
        self.held = dict(header["ready"])
        return None

    def stop(self, reason: str | None) -> None:
        """Kill the running worker and start none, until stopped with None; from any thread."""
        with self._lock:
            self._stopped = reason
            if reason is not None and self._process is not None:
                _kill(self._process)

    def close(self) -> None:
        """Kill the worker and its children, reap it and remove its folder."""
        if self._process is not None:
            self._reap(self._process)

    def _spawn(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="esper-forge-"))
        with open(self._folder / "stderr", "wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "esper.tezzeret.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self._folder,
                env=environment(self._folder, self.cache, os.environ),
                start_new_session=True,  # its compilers die with it, and Ctrl-C does not reach it
                bufsize=0,
            )
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        with self._lock:
            self._process = process
            if self._stopped is not None:
                _kill(process)

    def _exchange(self, frame: bytes, seconds: float, allowed: str) -> wire.Frame | Death:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        sending, received = memoryview(frame), bytearray()
        deadline, self.peak = clock.monotonic() + seconds, None
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            ready.register(process.stdin, selectors.EVENT_WRITE)
            while True:
                for key, _ in ready.select(TICK):
                    if key.fileobj is process.stdin:
                        sending = sending[_write(process.stdin.fileno(), sending) :]
                        if not sending:
                            ready.unregister(process.stdin)
                    elif not (chunk := os.read(process.stdout.fileno(), MIB)):
                        return self._bury()
                    else:
                        received += chunk
                try:
                    answer = wire.take(received, self.limits.answer)
                except ForgeError as error:
                    return self._bury(str(error))
                if answer is not None:
                    return answer
                if (broken := self._broken(process.pid, deadline, allowed)) is not None:
                    return self._bury(broken)
                if self._ended():
                    return self._bury()

    def _broken(self, pid: int, deadline: float, allowed: str) -> str | None:
        """Say which limit the worker is over, if over one."""
        memory = resident(pid)
        if memory is not None:
            self.peak = max(memory, self.peak or 0)
            if memory > (most := self.limits.resident):
                return f"ran into its limits: {memory // MIB} MiB resident, {most // MIB} allowed"
        return f"ran into its limits: {allowed} are over" if clock.monotonic() > deadline else None

    def _ended(self) -> bool:
        """Tell whether the worker ended, without reaping it: its group must still be there to be killed."""
        assert self._process is not None
        try:
            found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # the program waits for all its children, this one too
            return True
        return found is not None

    def _bury(self, broken: str | None = None) -> Death:
        """Kill what is left, and say how it ended."""
        assert self._process is not None
        if broken is None and not self._ended():
            clock.sleep(TICK)  # the pipe closes a moment before the process ends
        code, tail = self._reap(self._process)
        if self._stopped is not None or broken is not None:
            return Death(self._stopped or broken or "", again=False)
        if code == -signal.SIGXCPU:
            return Death(f"ran into its limits: {self.limits.cpu} s of CPU time are over", again=False)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return Death(f"the worker died ({how}){tail}", again=True)

    def _reap(self, process: subprocess.Popen[bytes]) -> tuple[int, str]:
        """Kill the worker and its group and remove its folder; return its exit code and last words."""
        with self._lock:
            _kill(process)
        with contextlib.suppress(ChildProcessError):  # gigabytes take a while to go; nobody waits for a lock
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._process = None
            code = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        tail = _tail(self._folder / "stderr")
        shutil.rmtree(self._folder, ignore_errors=True)
        return code, tail


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was not reaped, and its group; the caller holds the lock."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _write(pipe: int, data: memoryview) -> int:
    try:
        return os.write(pipe, data)
    except BrokenPipeError:  # it died; reading says so next
        return len(data)


def _tail(path: Path) -> str:
    """Return the end of what a worker wrote on its error stream, as the end of a message."""
    try:
        text = path.read_bytes()[-_TAIL:].decode(errors="replace").strip()
    except OSError:
        return ""
    return f"; the end of what it wrote:\n{text}" if text else ""
