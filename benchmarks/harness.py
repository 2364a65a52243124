"""What every bench does around its own measurement: options, tables, the JSON file, the exit code."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from benchmarks import machine
from benchmarks.arms import installed
from benchmarks.promises import Promise
from benchmarks.promises import table as promise_table

OPTIONAL = ("gromo",)  # arms named like the package they need
MIN_WIDTH = 150  # columns; a pipe reports 80, too few for a row of figures


@dataclass(frozen=True)
class Options:
    """The command line all benches share."""

    seeds: int
    quick: bool
    json: bool
    jobs: int
    out: Path
    arms: tuple[str, ...] | None

    def select(self, known: Sequence[str]) -> list[str]:
        """List the arms that were asked for; a comparator that is not installed is left out."""
        wanted = self.arms or known
        return [arm for arm in known if arm in wanted and (arm not in OPTIONAL or installed(arm))]


def options(name: str, doc: str | None, argv: Sequence[str], seeds: int, arms: Sequence[str] = ()) -> Options:
    """Read the command line of one bench, of which ``seeds`` is the default and ``arms`` are the choice."""
    parser = argparse.ArgumentParser(prog=f"esper bench {name}", description=doc)
    parser.add_argument("--seeds", type=int, default=None, help=f"seeds that are reported ({seeds})")
    parser.add_argument("--quick", action="store_true", help="a smoke run: seconds, nothing is judged")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (2); 0 runs in this one")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="where JSON and pictures go")
    parser.add_argument("--arms", type=lambda text: tuple(text.split(",")), help="only these arms, by comma")
    given = parser.parse_args(argv)
    count = given.seeds if given.seeds is not None else (2 if given.quick else seeds)
    if count < 1 or given.jobs < 0:
        parser.error("--seeds must be at least 1 and --jobs at least 0")
    if unknown := set(given.arms or ()) - set(arms):
        parser.error(f"no arm {', '.join(sorted(unknown))}; known: {', '.join(arms) or 'none'}")
    return Options(count, given.quick, given.json, given.jobs, given.out, given.arms)


def conclude(
    name: str,
    chosen: Options,
    shown: Sequence[RenderableType],
    promises: Sequence[Promise],
    figures: Mapping[str, Any],
) -> int:
    """Print, write ``<out>/<name>.json`` and say by the exit code whether every promise was kept."""
    record = {
        "bench": name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.facts(chosen.jobs),
        "seeds": chosen.seeds,
        "quick": chosen.quick,
        "promises": [promise.to_dict() for promise in promises],
        **figures,
    }
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / f"{name}.json"
    text = json.dumps(record, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    if chosen.json:
        print(text)
    else:
        console = Console()
        console.width = max(console.width, MIN_WIDTH)
        for part in (*shown, promise_table(promises)):
            console.print(part)
        console.print(f"figures of every seed: {path}")
        if chosen.quick:
            console.print("a quick run judges nothing: too few seeds, too few steps")
    return 0 if chosen.quick or all(promise.kept for promise in promises) else 1
