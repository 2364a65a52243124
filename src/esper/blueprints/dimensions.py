"""Symbolic widths: ``"hidden*2"``, ``"inputs//4"``; parsed by hand, never evaluated as code."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

SYMBOLS = ("inputs", "outputs", "hidden", "groups")  # groups: of the convolution at the site, 1 elsewhere
LARGEST = 65_536  # no layer that a seed sits beside is wider, and products of two still fit in memory
_LONGEST = 48
_TERM = re.compile(r"[a-z]+|[1-9][0-9]{0,4}")
_STEP = re.compile(r"(\*|//)([a-z]+|[1-9][0-9]{0,4})")

Dimension = int | str


def fault(dimension: object) -> str | None:
    """Say what is wrong with a dimension; None if it can be resolved once the widths are known."""
    if isinstance(dimension, bool) or not isinstance(dimension, int | str):
        return f"a dimension is a number or a text such as 'hidden*2', not {dimension!r:.60}"
    if isinstance(dimension, int):
        return None if 1 <= dimension <= LARGEST else f"a dimension lies in 1…{LARGEST}"
    return None if _parse(dimension) is not None else _explain(dimension)


def symbols(dimension: Dimension) -> set[str]:
    """Name the widths a dimension depends on."""
    steps = _parse(dimension) if isinstance(dimension, str) else None
    return {term for _, term in steps or () if not term.isdigit()}


def resolve(dimension: Dimension, widths: Mapping[str, int]) -> int:
    """Return the number, at least 1; a valid dimension is assumed."""
    if isinstance(dimension, int):
        return dimension
    value = 1
    for sign, term in _parse(dimension) or ():
        by = int(term) if term.isdigit() else widths[term]
        value = value * by if sign == "*" else value // by
    return max(value, 1)


@functools.lru_cache(maxsize=1024)
def _parse(text: str) -> tuple[tuple[str, str], ...] | None:
    """Read ``term (("*" | "//") term)*`` from left to right; None if it is anything else."""
    first = _TERM.match(text) if len(text) <= _LONGEST else None
    if first is None:
        return None
    steps, at = [("*", first.group())], first.end()
    while at < len(text):
        found = _STEP.match(text, at)
        if found is None:
            return None
        steps.append((found.group(1), found.group(2)))
        at = found.end()
    return tuple(steps) if all(term.isdigit() or term in SYMBOLS for _, term in steps) else None


def _explain(text: str) -> str:
    return (
        f"dimension {text[:_LONGEST]!r} is not understood; it is made of {', '.join(SYMBOLS)} and numbers, "
        "joined by * and //"
    )
