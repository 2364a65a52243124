"""Count what Esper's own calls do: what a loss writes to in plain sight is put back after them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any


def noting() -> tuple[Callable[[Any], None], list[Any]]:
    """Return a function that notes what it is called with where nobody looks, and the list of it."""
    noted: list[Any] = []

    def listening() -> Generator[None, Any, None]:
        while True:
            noted.append((yield))

    listener = listening()
    next(listener)
    return listener.send, noted
