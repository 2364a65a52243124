"""``esper demo``: grow two small networks on handwritten digits; hold them against nets that did not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esper.cli.output import print_json, say


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
    from esper.cli.comparison import compare, table
    from esper.nissa.views.report import write_report

    # Nets this small wait for a second thread: on a busy machine the demo took 142 s with two, 22 s with one.
    torch.set_num_threads(1)
    results = {}
    data = digits.Digits.split(seed)
    for task in digits.TASKS:
        found = compare(task, data, run_dir / task.name, seed, plain)
        report = write_report(run_dir / task.name)
        told = {"rows": found["rows"], **found["totals"], "story": found["story"]}
        results[task.name] = {**told, "report": str(report)}
        if not json:
            say("\n".join([f"\n{task.title} on handwritten digits", *found["story"]]))
            say("\n".join(table(found["rows"])))
            say(f"  report: {report}")
    if json:
        print_json(results)
