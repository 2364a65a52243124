"""``esper.summary``: the places of a model, the seeds in them and what they would cost, as a table."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from esper.kasmina.morphable import MorphableModel


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

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Draw the table."""
        out = io.StringIO()
        console = Console(file=out, width=118)
        console.print(
            f"{self.model}: {self.parameters:,} parameters, {self.flops:,} FLOPs per example and forward pass"
        )
        table = Table("site", "between", "width", "seeds", "per unit", box=None, pad_edge=False)
        if self.room:
            table.add_column("room")
        for row in self.sites:
            cells = [
                row["name"],
                " → ".join(row["between"]) or "–",
                str(row["width"]),
                row["seeds"],
                f"{row['unit_parameters']:,} parameters, {row['unit_flops']:,} FLOPs",
            ]
            table.add_row(*cells, *([f"{self.room[row['name']]} units"] if self.room else []))
        console.print(table)
        for row in self.refused:
            console.print(f"not at {row['place']}: {row['reason']}", highlight=False)
        if self.decisions:
            console.print(f"decisions due at steps {', '.join(map(str, self.decisions))}")
        return out.getvalue().rstrip()


def summary(model: MorphableModel) -> Summary:
    """Describe a wrapped model: sites, seeds, parameters, FLOPs, and refused places with the reason."""
    rows = []
    for name, pair in model.places.items():
        stages = Counter(model.layout.stage_of(seed).name.lower() for seed in model.seeds(name))
        rows.append(
            {
                "name": name,
                "kind": pair.site.kind,
                "between": list(pair.site.between),
                "width": pair.site.width,
                "seeds": ", ".join(f"{count} {stage}" for stage, count in stages.items()),
                "unit_parameters": pair.site.unit_parameters,
                "unit_flops": pair.site.unit_flops,
            }
        )
    refused = [{"place": r.place, "reason": r.reason} for r in model.refusals]
    return Summary(type(model.host).__name__, model.parameter_count(), model.flops, rows, refused)
