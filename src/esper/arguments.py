"""Checks of what a caller gives: what was asked, what would fit, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from esper.errors import ConfigError, EsperError, nearest
from esper.printable import quoted


def whole(
    name: str,
    value: object,
    *,
    least: int,
    most: int,
    none: bool = False,
    error: type[EsperError] = ConfigError,
) -> None:
    """Refuse what is no whole number within bounds.

    Args:
        name: Name of the argument, for messages.
        value: Value the caller gave.
        least: Smallest that fits.
        most: Largest that fits.
        none: True where None fits too.
        error: Class of the error raised.

    Raises:
        EsperError: ``error``, with what was given.
    """
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        end = ", or None" if none else ""
        raise error(f"{name}={quoted(value)}; give a whole number from {least:,} to {most:,}{end}")


def number(
    name: str, value: object, *, least: float, most: float, error: type[EsperError] = ConfigError
) -> None:
    """Refuse what is no number within bounds; NaN is within none.

    Raises:
        EsperError: ``error``, with what was given.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise error(f"{name}={quoted(value)}; give a number from {least:g} to {most:g}")


def flag(name: str, value: object, *, error: type[EsperError] = ConfigError) -> None:
    """Refuse what is not True or False.

    Raises:
        EsperError: ``error``, with what was given.
    """
    if not isinstance(value, bool):
        raise error(f"{name}={quoted(value)}; give True or False")


def word(name: str, value: object, known: Sequence[str], *, error: type[EsperError] = ConfigError) -> None:
    """Refuse what is none of the known words.

    Args:
        name: Name of the argument, for messages.
        value: Value the caller gave.
        known: Words that fit.
        error: Class of the error raised.

    Raises:
        EsperError: ``error``, naming the nearest.
    """
    if not isinstance(value, str) or value not in known:
        hint = nearest(value[:80], known) if isinstance(value, str) else f"known: {', '.join(known)}"
        raise error(f"{name}={quoted(value)}; {hint}")


def function(name: str, value: object, takes: str, *, error: type[EsperError] = ConfigError) -> None:
    """Refuse what cannot be called.

    Args:
        name: Name of the argument, for messages.
        value: Value the caller gave.
        takes: Its arguments in words, for messages.
        error: Class of the error raised.

    Raises:
        EsperError: ``error``, with what would be called how.
    """
    if not callable(value):
        raise error(f"{name}={quoted(value)} cannot be called; give a function {takes}")


def items(name: str, value: Iterable[object], *, error: type[EsperError] = ConfigError) -> list[object]:
    """Return what a collection holds; one of the user's own may break when it is read.

    Raises:
        EsperError: ``error``, with what it raised.
    """
    try:
        return list(value)
    except Exception as broken:  # it is the user's code that runs here: it raises what it likes
        said = f"{type(broken).__name__}: {broken}"
        raise error(
            f"{name}= cannot be read: a {type(value).__name__} raised {said}; give a list"
        ) from broken


def texts(name: str, value: object, needed: str, *, error: type[EsperError] = ConfigError) -> None:
    """Refuse what is not a list of texts; a text alone is none, though it can be iterated.

    Args:
        name: Name of the argument, for messages.
        value: Value the caller gave.
        needed: Name of what the texts are, for messages.
        error: Class of the error raised.

    Raises:
        EsperError: ``error``, with what was given.
    """
    fits = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    held = items(name, value, error=error) if fits else []
    if not held or not all(isinstance(one, str) for one in held):
        raise error(f"{name}={quoted(value)}; give a list of {needed}")


def batches(name: str, value: object, *, error: type[EsperError] = ConfigError) -> None:
    """Refuse what cannot be iterated, or holds letters and not batches.

    Raises:
        EsperError: ``error``, with what was given.
    """
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Iterable):
        raise error(f"{name}={quoted(value)}; give batches that can be iterated again, like a DataLoader")
