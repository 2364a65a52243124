"""Which places a user asks for, by name, by pattern or by type of layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from esper.errors import SiteError, nearest

DIRECTIONS = ("include", "exclude")
SAYS = (
    "give 'auto', a glob, a regular expression, a type of layer, several of them, or a mapping with "
    "'include' and 'exclude'"
)


def refuse_selectors(sites: object) -> None:
    """Refuse what selects no places.

    Raises:
        SiteError: With what was given, and what can be.
    """
    if not isinstance(sites, Mapping):
        _refuse(sites, sites)
        return
    for key, wanted in sites.items():
        if key not in DIRECTIONS:
            raise SiteError(f"sites={sites!r}: unknown key {key!r}; {nearest(str(key), DIRECTIONS)}")
        _refuse(wanted, sites)


def _refuse(wanted: object, sites: object) -> None:
    several = isinstance(wanted, Sequence) and not isinstance(wanted, str)
    for one in wanted if several else [wanted]:  # type: ignore[union-attr]  # it is a sequence
        if not isinstance(one, (str, re.Pattern, type)):
            raise SiteError(f"sites={sites!r}: a {type(one).__name__} selects no places; {SAYS}")
