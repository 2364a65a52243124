"""Does every public door refuse what does not fit in Esper's own words, and leave everything as it was?"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks import compare, harness
from benchmarks.door_calls import DOORS, Case, prepare
from benchmarks.door_values import net
from benchmarks.promises import Promise
from benchmarks.workers import workers
from esper.errors import EsperError
from esper.printable import quoted
from esper.tolaria.growth.run.observers import RAISED

NAME = "doors"
SEEDS = 10
CALLS = 2_000  # per seed, of all doors together
QUICK = 2  # a quick run makes so many times fewer: 2,000 by its two seeds
PATIENCE = 20  # seconds; a call that takes longer hangs
OUTSIDE = ("esper …", "esper train")  # a command is a process of its own: it may seed its streams


@dataclass
class Tally:
    """What one seed's calls came to."""

    seed: int
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by door and outcome
    raw: dict[str, str] = field(default_factory=dict)  # exceptions that are not Esper's, each with one call
    changed: dict[str, str] = field(default_factory=dict)  # failed calls that left something behind


class HangError(Exception):
    """A call that took too long."""


def main(argv: Sequence[str]) -> int:
    """Make twenty thousand calls with odd arguments; list what came out, and each raw exception once."""
    chosen = harness.options(NAME, __doc__, argv, seeds=SEEDS)
    calls = CALLS // (QUICK if chosen.quick else 1)
    with workers(chosen.jobs) as pool:
        tallies: list[Tally] = pool.map(partial(run_seed, calls=calls), range(chosen.seeds), NAME)
    counts: Counter[tuple[str, str]] = sum((tally.counts for tally in tallies), Counter())
    raw = {key: call for tally in tallies for key, call in tally.raw.items()}
    changed = {key: call for tally in tallies for key, call in tally.changed.items()}
    outcomes = ["taken", *sorted({outcome for _, outcome in counts} - {"taken"})]
    table = compare.titled(f"Odd arguments, {chosen.seeds} seeds", ["door", "calls", *outcomes])
    for door in DOORS:
        row = [counts[door, outcome] for outcome in outcomes]
        table.add_row(door, str(sum(row)), *(str(count or "–") for count in row))
    judged = [
        Promise("calls with odd arguments", sum(counts.values()), ">=", 20_000, digits=0),
        Promise("exceptions that are not Esper's, and hangs", len(raw), "<=", 0, digits=0),
        Promise("failed calls that left something behind", len(changed), "<=", 0, digits=0),
    ]
    shown = [table, *(f"{key}\n    {call}" for key, call in sorted({**raw, **changed}.items()))]
    figures = {
        "outcomes": {door: {o: counts[door, o] for o in outcomes if counts[door, o]} for door in DOORS},
        "raw": raw,
        "changed": changed,
    }
    code = harness.conclude(NAME, chosen, shown, judged, figures)
    return 1 if raw or changed else code


def run_seed(seed: int, calls: int) -> Tally:
    """Make one seed's calls, in a folder of their own."""
    tally = Tally(seed)
    with own_folder(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare()
        for door, (_, _, weight) in DOORS.items():
            explore(tally, door, max(calls * weight // 100, 1))
    return tally


@contextmanager
def own_folder() -> Iterator[None]:
    """Work in an empty folder, and without settings from outside."""
    before, folder = Path.cwd(), Path(tempfile.mkdtemp(prefix="esper-doors-"))
    path, modules = [*sys.path], set(sys.modules)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            if name == "door_host":
                del sys.modules[name]
        shutil.rmtree(folder, ignore_errors=True)


def explore(tally: Tally, door: str, count: int) -> None:
    """Make so many calls through one door."""

    @hypothesis.seed(tally.seed)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(DOORS[door][1])
    def trial(changes: dict[str, Any]) -> None:
        judge(tally, Case(door, changes, net()))

    with quiet():
        trial()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what a called function prints off the table."""
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = out


def judge(tally: Tally, case: Case) -> None:
    """Make one call, note what came out, and hold the model to its twin."""
    before = state_of(case)
    try:
        with limited(PATIENCE):
            outcome = DOORS[case.door][0](case) or "taken"
    except EsperError as error:
        outcome = type(error).__name__
    except Exception as error:  # what this bench counts
        outcome = "raw"
        if any(note.startswith(RAISED) for note in getattr(error, "__notes__", ())):
            outcome = "their own"  # an on_event that cannot take an event
        else:
            tally.raw.setdefault(f"{case.door}: {place_of(error)}", told(case))
    tally.counts[case.door, outcome] += 1
    after = state_of(case)
    names = ["streams"] if case.door in OUTSIDE else []
    different = [name for name in before if before[name] != after[name] and name not in names]
    if outcome != "taken" and not outcome.startswith("exit") and different:
        tally.changed.setdefault(f"{case.door}: {outcome} left {', '.join(different)} changed", told(case))


def state_of(case: Case) -> dict[str, Any]:
    """Everything of a twin that a call which fails must leave as it is."""
    modules = [case.model, *case.model.modules()]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    owner = case.optimizer
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in case.model.state_dict().items()},
        "gradients": [parameter.grad is None for parameter in case.model.parameters()],
        "classes": [(type(module), module.training, sorted(vars(module))) for module in modules],
        "hooks": [len(getattr(module, name)) for module in modules for name in hooks],
        "optimizer": (
            len(owner._optimizer_step_post_hooks),
            len(owner._optimizer_step_pre_hooks),
            len(owner._optimizer_state_dict_pre_hooks),
            len(owner._optimizer_load_state_dict_post_hooks),
            sorted(vars(owner)),
        ),
        "streams": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()),
    }


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise inside what takes longer."""

    def alarm(*_: Any) -> None:
        raise HangError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def place_of(error: Exception) -> str:
    """Name an exception by its kind and the last line of Esper's it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/esper/" in frame.filename]
    where = f"{frames[-1].filename.partition('/esper/')[2]}:{frames[-1].name}" if frames else "outside"
    return f"{type(error).__name__} in {where}"


def told(case: Case) -> str:
    """Write a call's odd arguments shortly."""
    return f"{case.door}({', '.join(f'{name}={quoted(value)}' for name, value in case.changes.items())})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
