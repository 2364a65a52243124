"""Shows text from outside: what a terminal would obey, or hide, becomes visible."""

from __future__ import annotations

import reprlib

BLOCK = "+block"  # how the name of a stack ends, where whole blocks grow
QUOTE = 80  # characters of an input that a message repeats
_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring, _brief.maxlong, _brief.maxother = 3, QUOTE - 2, QUOTE, QUOTE


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Write whatever is no printable character as its escape, as Python's repr does.

    Args:
        text: Text of a file, a name, a path, an error of somebody else's code.
        keep: Characters that may stay; "" where the text is one line among others.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else _escaped(c) for c in text)


def quoted(value: object) -> str:
    """Return the beginning of a value's repr, as a message repeats it."""
    try:
        text = printable(_brief.repr(value), keep="")
    except Exception:  # a repr of somebody else's, or a number too long for Python to write
        text = f"a {type(value).__name__}"
    return text if len(text) <= QUOTE else text[: QUOTE - 1] + "…"


def shortened(text: str, most: int) -> str:
    """Cut a text that is longer than anybody reads, and say so."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} characters more)"


def raised(error: BaseException) -> str:
    """Name an error by its type and the first line of its words, as a note beside others shows it."""
    words = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def times(count: int) -> str:
    """Say how often something is called."""
    return "once" if count == 1 else f"{count} times"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def counted(site: str, count: int) -> str:
    """Say how many of what grows at a place: blocks of a stack, units everywhere else."""
    return f"{count} {'block' if site.endswith(BLOCK) else 'unit'}{'s' * (count != 1)}"
