"""A promise is a line of the README that a bench may prove wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table


@dataclass(frozen=True)
class Promise:
    """What was said, what was measured; what was not measured (None) is not kept."""

    text: str
    measured: float | None
    relation: Literal["<=", "<", ">=", ">"]
    bound: float | None  # None: the arm to beat was left out
    digits: int = 4

    @property
    def kept(self) -> bool:
        value, bound = self.measured, self.bound
        if value is None or bound is None or math.isnan(value):
            return False
        return {
            "<=": value <= bound,
            "<": value < bound,
            ">=": value >= bound,
            ">": value > bound,
        }[self.relation]

    def to_dict(self) -> dict[str, object]:
        return {
            "promise": self.text,
            "measured": self.measured,
            "relation": self.relation,
            "bound": self.bound,
            "kept": self.kept,
        }


def table(promises: Sequence[Promise]) -> Table:
    """Print every promise beside its figure: pass or MISS."""
    shown = Table(title="Promises", title_justify="left")
    shown.add_column("promise")
    for heading in ("measured", "promised", ""):
        shown.add_column(heading, justify="right")
    for promise in promises:
        shown.add_row(
            promise.text,
            figure(promise.measured, promise.digits),
            f"{promise.relation} {figure(promise.bound, promise.digits)}",
            "[green]pass[/]" if promise.kept else "[red]MISS[/]",
        )
    return shown


def figure(value: float | None, digits: int) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"
