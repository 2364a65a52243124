"""A signal ends training after its step, with a checkpoint; then the process ends as it always would."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from esper.tolaria.trainer import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Asked:
    """Which signal came first; None so far."""

    signum: int | None = None


@contextmanager
def stopped_by_signals(trainer: Trainer) -> Iterator[Asked]:
    """While it is open, the first signal asks the trainer to stop; a second one does what it always does."""
    asked = Asked()
    before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}

    def put_back() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def ask(signum: int, frame: FrameType | None) -> None:
        put_back()
        asked.signum = signum
        trainer.stop()

    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals come to the main thread only, and are its own
        return
    for one in SIGNALS:
        if signal.getsignal(one) not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP, and means it
            before[one] = signal.signal(one, ask)
    try:
        yield asked
    finally:
        put_back()


def end_as(signum: int) -> None:
    """End this process as a signal does, so that whoever waits for it sees the usual status."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
