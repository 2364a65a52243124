"""``esper demo``: grow two small networks on handwritten digits; hold them against nets that did not."""

from __future__ import annotations

import json as text
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from esper.cli.output import growth_lines, print_json, say
from esper.nissa.wording import count


def demo(
    run_dir: Annotated[Path, typer.Option(help="Where to write; one folder per model.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of the split, the weights, the order and growth.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Progress as lines, always.")] = False,
) -> None:
    """Grow a small MLP and a small CNN on handwritten digits; compare with the same nets not grown.

    Each is trained three times with the same data, steps and optimizer: growing, not growing, and fixed at
    the size the growing one ended with. Takes less than two minutes on 2 cores and needs no network.
    """
    import torch

    from esper.cli import digits
    from esper.nissa.views.report import write_report

    # Nets this small wait for a second thread: on a busy machine the demo took 142 s with two, 22 s with one.
    torch.set_num_threads(1)
    results = {}
    data = digits.Digits.split(seed)
    for task in digits.TASKS:
        results[task.name] = result = compare(task, data, run_dir / task.name, seed, plain)
        report = write_report(run_dir / task.name)
        result["report"] = str(report)
        if not json:
            say("\n".join([f"\n{task.title} on handwritten digits", *result.pop("story")]))
            say("\n".join(table(result["rows"])))
            say(f"  report: {report}")
    if json:
        print_json(results)


def compare(task: Any, data: Any, folder: Path, seed: int, plain: bool) -> dict[str, Any]:
    """Train a task's three nets and write down how they compare."""
    from esper.cli import digits
    from esper.nissa.views.live import LiveView
    from esper.nissa.views.report import COMPARISON_FILE

    with LiveView(plain=plain or None) as view:
        net, growth = digits.train_grown(task, data, folder, seed, view)
    growth.save(folder / "model")
    totals = view.history.totals
    rows = [
        {
            "name": f"{show(task.small)} grown to {show(net.widths)}",
            "accuracy": data.accuracy(net),
            "parameters": totals["parameters_after"],
            "flops": (totals["training_flops"] or 0) + (totals["growth_flops"] or 0),
            "seconds": totals["seconds"],
        }
    ]
    rivals = [(f"{show(task.small)} not grown", task.small, "no-growth")]
    if net.widths != task.small:
        rivals.append((f"{show(net.widths)} from the start", net.widths, "fixed"))
    for name, widths, place in rivals:
        with LiveView(plain=plain or None, transient=True) as other:
            row = digits.train_fixed(task, widths, data, folder / place, seed, other)
        rows.append({"name": name, **row, "run": place})
    (folder / COMPARISON_FILE).write_text(text.dumps(rows, indent=2), encoding="utf-8")
    return {"rows": rows, **totals, "story": list(growth_lines(view.history))}


def show(widths: tuple[int, ...]) -> str:
    """Write widths as people say them."""
    return "-".join(map(str, widths)) + (" hidden" if len(widths) == 1 else " channels")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Lay the comparison out in columns."""
    yield f"  {'':<36}{'accuracy':>9}{'parameters':>12}{'FLOPs':>10}{'seconds':>9}"
    for row in rows:
        yield (
            f"  {row['name']:<36}{row['accuracy']:>9.4f}{row['parameters']:>12,}"
            f"{count(row['flops']):>10}{row['seconds']:>9.1f}"
        )
