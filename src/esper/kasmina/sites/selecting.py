"""Which places the user asks for: selectors, checked before anything is looked at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from torch import nn

from esper.arguments import items
from esper.errors import SiteError, nearest
from esper.printable import quoted

Selector: TypeAlias = "str | re.Pattern[str] | type[nn.Module]"
Sites: TypeAlias = "Selector | Sequence[Selector] | Mapping[str, Selector | Sequence[Selector]]"
DIRECTIONS = ("include", "exclude")


def refuse_selectors(sites: object) -> None:
    """Refuse what selects no place, whatever the model.

    Raises:
        SiteError: With what was given.
    """
    if not isinstance(sites, Mapping):
        _refuse(sites, "sites", empty=False)
        return
    if not sites:
        raise SiteError("sites={} selects nothing; give 'include', 'exclude' or both, or leave it out")
    for direction, wanted in sites.items():
        if direction not in DIRECTIONS:
            hint = nearest(quoted(direction), DIRECTIONS)
            raise SiteError(f"sites has the unknown key {quoted(direction)}; {hint}")
        _refuse(wanted, f"sites[{direction!r}]", empty=direction == "exclude")


def selects(one: object) -> bool:
    """Tell what may select layers from what never does."""
    if isinstance(one, re.Pattern):
        return isinstance(one.pattern, str)  # one of bytes matches no name
    if isinstance(one, type):
        return issubclass(one, nn.Module)
    return isinstance(one, str) and one != ""


def _refuse(wanted: object, where: str, *, empty: bool) -> None:
    several = isinstance(wanted, Sequence) and not isinstance(wanted, str | bytes | bytearray)
    for one in items(where, wanted, error=SiteError) if several else [wanted]:
        if not selects(one):
            raise SiteError(
                f"{where}={quoted(wanted)}: {quoted(one)} selects no layer; give 'auto', a glob, a compiled "
                "regular expression, a type of layer, or a list of these"
            )
    if several and not wanted and not empty:
        raise SiteError(f"{where}={quoted(wanted)} selects nothing; leave it out for every place")
