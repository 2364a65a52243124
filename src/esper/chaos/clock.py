"""A clock that jumps: the process's own, wrapped before anything else has taken hold of it.

Only what Python code reads is wrapped. ``real`` is the clock by which the rehearsal measures.
"""

from __future__ import annotations

import time
from collections.abc import Callable

real = time.monotonic  # shared by all processes of a machine
CLOCKS = ("time", "monotonic", "perf_counter")
_own: dict[str, Callable[[], float]] = {name: getattr(time, name) for name in CLOCKS}
_own_ns: dict[str, Callable[[], int]] = {f"{name}_ns": getattr(time, f"{name}_ns") for name in CLOCKS}
_ahead = dict.fromkeys(CLOCKS, 0.0)  # seconds


def install() -> None:
    """Wrap ``time.time``, ``monotonic`` and ``perf_counter``; nothing jumps yet."""
    for name in CLOCKS:
        setattr(time, name, lambda name=name: _own[name]() + _ahead[name])
        fine = f"{name}_ns"
        setattr(time, fine, lambda name=name, fine=fine: _own_ns[fine]() + int(_ahead[name] * 1e9))


def remove() -> None:
    """Give the process its clocks back."""
    for name in CLOCKS:
        setattr(time, name, _own[name])
        setattr(time, f"{name}_ns", _own_ns[f"{name}_ns"])
        _ahead[name] = 0.0


def jump(seconds: float, *names: str) -> None:
    """Set clocks forward or, with negative seconds, back."""
    for name in names or CLOCKS:
        _ahead[name] += seconds
