"""Callbacks that do not keep alive whom they call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

Told = TypeVar("Told")


def weakly(method: Callable[[Told], object]) -> Callable[[Told], None]:
    """Return what calls a bound method for as long as its object lives, and nothing after that.

    What a user's model or optimizer holds of a run must not hold the run.
    """
    held = weakref.WeakMethod(method)

    def call(told: Told) -> None:
        living = held()
        if living is not None:
            living(told)

    return call
