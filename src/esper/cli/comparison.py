"""The demo's comparison: a net that grew, the same not grown, and one of the grown size from the start."""

from __future__ import annotations

import json as text
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from esper.cli import digits
from esper.cli.output import growth_lines
from esper.nissa.run.history import Totals
from esper.nissa.views.live import LiveView
from esper.nissa.views.report import COMPARISON_FILE, Row
from esper.nissa.wording import count


class Comparison(TypedDict):
    """How a task's three nets compare."""

    rows: list[Row]
    totals: Totals  # of the run that grew
    story: list[str]  # what grew, in lines


def compare(task: digits.Task, data: digits.Digits, folder: Path, seed: int, plain: bool) -> Comparison:
    """Train a task's three nets and write down how they compare.

    Args:
        task: Host, its widths and how it is trained.
        data: Digits trained and judged on.
        folder: Path of the run's folder.
        seed: Seed of weights, order and growth.
        plain: True for progress as lines; False: as the terminal allows.
    """
    with LiveView(plain=plain or None) as view:
        net, growth = digits.train_grown(task, data, folder, seed, view)
    growth.save(folder / "model")
    totals = view.history.totals
    training, growing = totals["training_flops"], totals["growth_flops"]
    assert training is not None and growing is not None  # the run has finished
    rows: list[Row] = [
        {
            "name": f"{show(task.small)} grown to {show(net.widths)}",
            "accuracy": data.accuracy(net),
            "parameters": totals["parameters_after"],
            "flops": training + growing,
            "seconds": totals["seconds"],
        }
    ]
    rivals = [(f"{show(task.small)} not grown", task.small, "no-growth")]
    if net.widths != task.small:
        rivals.append((f"{show(net.widths)} from the start", net.widths, "fixed"))
    for name, widths, place in rivals:
        with LiveView(plain=plain or None, transient=True) as other:
            cost = digits.train_fixed(task, widths, data, folder / place, seed, other)
        rows.append(
            {
                "name": name,
                "accuracy": cost["accuracy"],
                "parameters": cost["parameters"],
                "flops": cost["flops"],
                "seconds": cost["seconds"],
                "run": place,
            }
        )
    (folder / COMPARISON_FILE).write_text(text.dumps(rows, indent=2), encoding="utf-8")
    return Comparison(rows=rows, totals=totals, story=list(growth_lines(view.history)))


def show(widths: tuple[int, ...]) -> str:
    """Write widths as people say them."""
    return "-".join(map(str, widths)) + (" hidden" if len(widths) == 1 else " channels")


def table(rows: list[Row]) -> Iterator[str]:
    """Lay the comparison out in columns."""
    yield f"  {'':<36}{'accuracy':>9}{'parameters':>12}{'FLOPs':>10}{'seconds':>9}"
    for row in rows:
        yield (
            f"  {row['name']:<36}{row['accuracy']:>9.4f}{row['parameters']:>12,}"
            f"{count(row['flops']):>10}{row['seconds']:>9.1f}"
        )
