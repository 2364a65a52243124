"""Whether a model, its loss or its probe draws from the process-wide streams of Python and numpy.

Where other threads live, putting those streams back would repeat what a thread has drawn meanwhile. So it is
done for models only that were seen to draw from them, in this thread, in their first passes.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from torch import nn

HOMES = ((random, random.random.__self__), (np.random, np.random.rand.__self__))  # type: ignore[attr-defined]
DRAWERS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Listening:
    """A function that draws, and notes whether this thread called it."""

    def __init__(self, function: Callable[..., object], heard: list[str], thread: int) -> None:
        self.function, self.heard, self.thread = function, heard, thread

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Draw."""
        if threading.get_ident() == self.thread:
            self.heard.append(self.function.__name__)
        return self.function(*args, **kwargs)


@contextmanager
def draws_noted(model: nn.Module) -> Iterator[None]:
    """Listen to the functions of ``random`` and ``numpy.random`` for a few passes; others draw as ever."""
    heard: list[str] = []
    replaced: list[tuple[object, str, object]] = []
    try:
        for home, stream in HOMES:
            for name, function in vars(home).copy().items():
                if getattr(function, "__self__", None) is stream:
                    replaced.append((home, name, function))
                    setattr(home, name, Listening(function, heard, threading.get_ident()))
        yield
    finally:
        for home, name, function in replaced:
            setattr(home, name, function)
        if heard:
            DRAWERS.add(model)


def forgetting(model: nn.Module) -> Callable[[], None]:
    """Return what ends the care for a model's draws, without holding the model."""
    held = weakref.ref(model)

    def forget() -> None:
        known = held()
        if known is not None:
            DRAWERS.discard(known)

    return forget


@contextmanager
def global_streams_restored() -> Iterator[None]:
    """Put the streams of Python and numpy back, where a model is known that draws from them.

    With them goes the second of two normal numbers, which numpy keeps beside its bit generator.
    """
    if not DRAWERS:
        yield
        return
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)


def alone() -> bool:
    """Tell whether no other thread can draw random numbers."""
    others = [one for one in threading.enumerate() if one is not threading.current_thread()]
    return all(type(one).__module__.startswith(("tqdm.", "rich.", "esper.")) for one in others)
