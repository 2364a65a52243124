"""What commands print: one JSON document for programs, what grew where and why for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

from esper.nissa.run.history import RunHistory
from esper.nissa.run.journal import plain
from esper.nissa.wording import count, duration, short
from esper.printable import BLOCK, counted, printable


def print_json(value: object) -> None:
    """Print a value as strict JSON in ASCII; non-finite numbers become the strings of the journal."""
    text = json.dumps(plain(value, "the result"), indent=2, allow_nan=False)
    print(text.replace("\x7f", "\\u007f"))  # DEL is the one control character that JSON leaves as it is


def say(text: str, *, error: bool = False) -> None:
    """Print text for people; what it quotes from files, paths and names moves no terminal."""
    print(printable(text), file=sys.stderr if error else sys.stdout, flush=True)


def growth_lines(history: RunHistory) -> Iterator[str]:
    """Say what grew where and why, one line per decision that was judged."""
    totals = history.totals
    yield (
        f"{totals['model']}: {short(totals['parameters_before'])} → {short(totals['parameters_after'])} "
        f"parameters in {short(totals['steps'])} steps, {duration(totals['seconds'])}; training cost "
        f"{count(totals['training_flops'])} FLOPs, growing {count(totals['growth_flops'])}"
    )
    for decision in history.decisions.values():
        if decision.outcome is None:
            continue
        units = f"+{decision.chosen.get('width', '?')}"
        yield (
            f"  step {decision.step:>6}  {decision.site} {units:<4} {decision.verdict:<7}  "
            f"held-out gain {short(decision.outcome['gain'], 3)}: {decision.outcome['reason']}"
        )
    for grown in totals["grown"]:
        site = grown["site"]
        is_now, was = ("has {}", "had") if site.endswith(BLOCK) else ("is {} wide", "was")
        yield f"  {site} {is_now.format(counted(site, grown['after']))}, it {was} {grown['before']}"
