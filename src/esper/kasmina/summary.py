"""``esper.summary``: the places of a model, the seeds in them and what they would cost, as a table."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from esper.errors import SiteError
from esper.kasmina.morphable import MorphableModel
from esper.printable import printable


@dataclass
class Summary:
    """What there is; prints as a table."""

    model: str
    parameters: int
    flops: int  # forward, per example
    sites: list[dict[str, Any]]
    refused: list[dict[str, str]]
    decisions: list[int] = field(default_factory=list)  # steps at which one is due; only in a plan
    room: dict[str, int] = field(default_factory=dict)  # units the budget allows per site; only in a plan
    growth: str | None = None  # the recipe: early, incubate, off; only in a plan
    limits: dict[str, Any] = field(default_factory=dict)  # what the budget allows; only in a plan

    def offers(self) -> list[tuple[str, str, list[str]]]:
        """List the places of blueprints: name, kind, and what fits there."""
        found: dict[tuple[str, str], list[str]] = {}
        for row in self.sites:
            if row["kind"] != "pair":
                place = row["name"].removesuffix(f"+{row['blueprint']}")
                found.setdefault((place, row["kind"]), []).append(row["blueprint"])
        return [(place, kind, names) for (place, kind), names in found.items()]

    def most(self) -> str:
        """Say how large the grown model may be."""
        words = {"parameters": "{:,} parameters", "flops": "{:,} FLOPs", "latency_ms": "{:g} ms"}
        return ", ".join(words[name].format(most) for name, most in self.limits.items() if most is not None)

    def to_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Draw the table."""
        out = io.StringIO()
        console = Console(file=out, width=118, markup=False, emoji=False)  # a name is no markup
        console.print(
            f"{self.model}: {self.parameters:,} parameters, {self.flops:,} FLOPs per example and forward pass"
        )
        pairs = [row for row in self.sites if row["kind"] == "pair"]
        table = Table("site", "between", "width", "seeds", "per unit", box=None, pad_edge=False)
        if self.room:
            table.add_column("room")
        for row in pairs:
            cells = [
                row["name"],
                " → ".join(row["between"]) or "–",
                str(row["width"]),
                row["seeds"],
                f"{row['unit_parameters']:,} parameters, {row['unit_flops']:,} FLOPs",
            ]
            table.add_row(*cells, *([f"{self.room[row['name']]} units"] if self.room else []))
        if pairs:
            console.print(table)
        offers = Table("place", "kind", "blueprints that fit", box=None, pad_edge=False)
        for place, kind, names in self.offers():
            offers.add_row(place, kind, ", ".join(names))
        if offers.rows:
            console.print(offers)
        for row in self.refused:
            console.print(f"not at {row['place']}: {row['reason']}", highlight=False)
        if self.limits:
            console.print(f"at most {self.most()}", highlight=False)
        if self.growth == "off":
            console.print("growth is off")
        if self.decisions:
            console.print(f"decisions due at steps {', '.join(map(str, self.decisions))}")
        return printable(out.getvalue().rstrip())


def summary(model: MorphableModel) -> Summary:
    """Describe a wrapped model: sites, seeds, parameters, FLOPs, and refused places with the reason.

    Raises:
        SiteError: ``model`` is not wrapped.
    """
    if not isinstance(model, MorphableModel):
        raise SiteError(
            f"a {type(model).__name__} is not wrapped; summary takes what esper.wrap returned, and "
            "esper.plan any model"
        )
    rows = []
    for name, place in model.places.items():
        stages = Counter(model.layout.stage_of(seed).name.lower() for seed in model.seeds(name))
        rows.append(
            {
                "name": name,
                "kind": place.site.kind,
                "blueprint": place.site.blueprint,
                "between": list(place.site.between),
                "width": place.site.width,
                "seeds": ", ".join(f"{count} {stage}" for stage, count in stages.items()),
                "unit_parameters": place.site.unit_parameters,
                "unit_flops": place.site.unit_flops,
            }
        )
    refused = [{"place": r.place, "reason": r.reason} for r in model.refusals]
    return Summary(type(model.host).__name__, model.parameter_count(), model.flops, rows, refused)
