"""How numbers read in the terminal, the report and the explanations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

UNKNOWN = "–"


def short(value: object, digits: int = 4) -> str:
    """Write a value of an event in a few characters; None is a dash."""
    if value is None:
        return UNKNOWN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {short(item, digits)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(short(item, digits) for item in value)
    return str(value)


def count(value: float | None) -> str:
    """Write a large number with a unit: 1.36 G; None is a dash."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    for unit in ("", " k", " M", " G", " T", " P"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} E"


def duration(seconds: float | None) -> str:
    """Write seconds as 12.3 s or 4 min 05 s; None is a dash."""
    if seconds is None:
        return UNKNOWN
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
