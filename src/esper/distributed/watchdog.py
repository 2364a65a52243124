"""Notices a process that has gone silent, and ends this one, so that torchrun can start all of them again.

A process that dies closes its connections, and the others are told at once. One that is stopped, or whose
machine is gone, tells nobody: the others wait inside a collective of the backward pass, for half an hour by
torch's default, where no Python runs. A thread with a group of its own goes on hearing from the others
meanwhile. Work that takes long is not silence: one process may read or evaluate while the others wait.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from threading import Event, Thread

import torch
import torch.distributed as dist

from esper.distributed.group import gloo_group

PULSE = 1.0  # seconds between signs of life
EXIT = 75  # EX_TEMPFAIL: start it again


class Watchdog:
    """Exchanges signs of life with the other processes.

    Args:
        process_group: Those that train the model; None: all.
        deadline: Seconds of silence after which ``lost`` is called.
        lost: Called on the watchdog's thread, with the seconds of silence.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        deadline: float,
        lost: Callable[[float], None] | None = None,
    ) -> None:
        self.group = gloo_group(process_group, deadline)
        self.deadline, self.lost = deadline, lost or give_up
        self.closing = Event()
        self.thread = Thread(target=self.watch, name="esper-watchdog", daemon=True)
        self.thread.start()
        atexit.register(self.close)  # a thread inside a collective would abort the interpreter's end

    def watch(self) -> None:
        """Go on until a process leaves; the one that leaves says so."""
        while True:
            leaving = torch.tensor([int(self.closing.is_set())])
            begun = time.monotonic()
            try:
                dist.all_reduce(leaving, op=dist.ReduceOp.MAX, group=self.group)
            except RuntimeError:
                silence = time.monotonic() - begun
                if silence >= 0.9 * self.deadline and not self.closing.is_set():
                    self.lost(silence)
                return  # a process that died is told to everybody by the next collective
            if leaving.item():
                return
            self.closing.wait(PULSE)

    def close(self) -> None:
        """Say goodbye; the others' watchdogs end too."""
        atexit.unregister(self.close)
        self.closing.set()
        self.thread.join(2 * PULSE)


def give_up(silence: float) -> None:
    """End this process, wherever its main thread is."""
    print(
        f"esper: another process has been silent for {silence:.0f} s; this one ends with code {EXIT}, so "
        "that the run can be started again with --resume auto (torchrun --max-restarts does)",
        file=sys.stderr,
        flush=True,
    )
    os._exit(EXIT)
