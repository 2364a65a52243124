"""Sections that Ctrl-C does not cut in two: it is heard as soon as they are over.

Surgery changes a module, its optimizers and what a run knows of them one after the other, and a moment
between two of these has no way back. Such sections are short; races and looks stay outside.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let handlers of signals, which may raise, wait for the end; only the main thread runs any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    heard: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        heard.append((number, frame))

    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):  # the system's own end the process, whole or not
                handlers[number] = handler
                signal.signal(number, note)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in heard:
            handlers[number](number, frame)
