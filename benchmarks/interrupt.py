"""Does a run that is cut off after any of its steps end as if it never was: 60 steps, every stage?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import compare, harness
from benchmarks.lifecycle import LOST, STEPS, Journey, digest
from benchmarks.promises import Promise
from esper.checkpoint import MemoryStorage
from esper.checkpoint.format.manifest import name_of
from esper.contracts import Stage

NAME = "interrupt"
WORKERS = (0, 2)  # of the loader
QUICK = (2, 9, 21, 24, 39, 41)  # the steps after which a quick run is cut off: every stage is among them
STAGES = [stage.name for stage in Stage if stage is not Stage.ROLLED_BACK]  # that one is the governor's
GOVERNED = (17, LOST - 1, LOST)  # likewise of a run whose governor rolls back a batch of NaN


def main(argv: Sequence[str]) -> int:
    """Cut one run off after each of its steps, go on in a fresh one, and compare everything at the end."""
    torch.set_num_threads(1)
    if argv[:1] == ["--child"]:
        return child(argv[1], int(argv[2]), int(argv[3]))
    chosen = harness.options(NAME, __doc__, argv, seeds=1)
    steps = QUICK if chosen.quick else range(1, STEPS + 1)
    found = {workers: interrupted(workers, steps) for workers in WORKERS}
    asked = WORKERS[-1:] if chosen.quick else WORKERS  # a process takes seconds to import torch
    killed = {w: chain(found[w], w, QUICK[2:3] if chosen.quick else found[w].firsts()) for w in asked}
    governed = interrupted(0, GOVERNED if chosen.quick else range(1, STEPS + 1), governed=True)
    table = compare.titled(
        f"A run of {STEPS} steps that was cut off and gone on with: equal to the run that never was",
        [
            "a seed was then in, or passed in the step before or after",
            *(f"{w} workers" for w in WORKERS),
            "governed",
        ],
    )
    shown = [*found.values(), governed]
    for stage in [*STAGES, Stage.ROLLED_BACK.name]:
        table.add_row(stage, *(one.row(stage) for one in shown))
    table.add_row("any", *(one.row() for one in shown))
    table.add_row(
        "killed -9 in every stage, one process after the other", *map(said, map(killed.get, WORKERS)), "–"
    )
    judged = [
        Promise(
            "steps after which it was cut off, and everything was equal",
            sum(sum(not lines for lines in one.differences.values()) for one in found.values()),
            ">=",
            len(WORKERS) * STEPS,
            digits=0,
        ),
        Promise(
            "governed, with a rollback: steps after which it was cut off, and everything was equal",
            sum(not lines for lines in governed.differences.values()),
            ">=",
            STEPS,
            digits=0,
        ),
        Promise(
            "stages it was cut off in",
            min(len(one.covered()) for one in found.values()),
            ">=",
            len(STAGES),
            digits=0,
        ),
        Promise(
            "saved after every step without a cut: equal",
            min(not one.disturbed for one in found.values()),
            ">=",
            1,
            digits=0,
        ),
        Promise(
            "killed -9 in every stage, in processes: equal",
            min(one["equal"] for one in killed.values()),
            ">=",
            1,
            digits=0,
        ),
    ]
    record = {str(workers): one.to_dict() | killed.get(workers, {}) for workers, one in found.items()}
    figures = {"workers": record, "governed": governed.to_dict()}
    return harness.conclude(NAME, chosen, [table], judged, figures)


def said(killed: Mapping[str, Any] | None) -> str:
    """Show what a chain of processes came to."""
    return (
        "–" if killed is None else f"{killed['kills']} kills, {'equal' if killed['equal'] else 'NOT EQUAL'}"
    )


@dataclass
class Cuts:
    """One run, and what it came to with each of its cuts."""

    end: Mapping[str, Any]  # of the run that never was cut off
    data: Mapping[int, str]  # what it saw, by step
    stages: Mapping[int, set[str]]  # by step
    disturbed: list[str]  # what saving alone changed
    differences: dict[int, list[str]] = field(default_factory=dict)  # by the step of the cut

    def covered(self) -> set[str]:
        return set().union(*(self.stages[step] for step in self.differences))

    def firsts(self) -> list[int]:
        """Return the first step of every stage."""
        return sorted(
            {min(s for s, found in self.stages.items() if name in found) for name in self.covered()}
        )

    def row(self, stage: str | None = None) -> str:
        mine = [lines for step, lines in self.differences.items() if stage in (None, *self.stages[step])]
        return f"{sum(not lines for lines in mine)} of {len(mine)}"

    def to_dict(self) -> dict[str, Any]:
        stages = {step: sorted(self.stages[step]) for step in self.differences}
        different = {step: lines for step, lines in self.differences.items() if lines}
        return {"stages": stages, "different": different, "disturbed": self.disturbed}


def interrupted(workers: int, steps: Sequence[int], governed: bool = False) -> Cuts:
    """Cut a run off after each of the steps."""
    whole = Journey(MemoryStorage(), workers, governed=governed)
    whole.heard[0] = len(whole.events)
    whole.train()
    end = whole.end()
    kept = MemoryStorage()
    saving = Journey(kept, workers, governed=governed)
    saving.heard[0] = len(saving.events)
    saving.train(after=lambda: saving.manager.save(wait=True))
    cuts = Cuts(
        end, whole.seen, passed(whole), different(end | whole.since(0), saving.end() | saving.since(0))
    )
    for step in steps:
        again = Journey(only(kept, step), workers, governed=governed)
        again.resume()
        again.train()
        cuts.differences[step] = different(end | whole.since(step), again.end() | again.since(step))
    return cuts


def only(kept: MemoryStorage, step: int) -> MemoryStorage:
    """Return a storage with one of the checkpoints."""
    storage = MemoryStorage()
    storage.kept[name_of(step)] = kept.kept[name_of(step)]
    return storage


def passed(run: Journey) -> dict[int, set[str]]:
    """Name, by step, the stages it left seeds in and those that were passed in it or in the next one."""
    stages = {step: set(found) for step, found in run.stages.items()}
    for event in run.events:
        if event.kind == "stage":
            for step in {event.step - 1, event.step} & stages.keys():
                stages[step] |= {event.data["target"]} - {Stage.DORMANT.name}
    return stages


def different(want: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """Name the parts that are not equal, bit for bit."""
    return sorted(name for name in {*want, *got} if want.get(name) != got.get(name))


# -- in processes --------------------------------------------------------------------------------------------


def chain(cuts: Cuts, workers: int, steps: Sequence[int]) -> dict[str, Any]:
    """Go through one run in processes, each of which kills itself after its step; compare the end."""
    seen: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="esper-interrupt-") as folder:
        for until in (*steps, STEPS):
            command = [
                sys.executable,
                "-m",
                "benchmarks.interrupt",
                "--child",
                folder,
                str(workers),
                str(until),
            ]
            root = Path(__file__).resolve().parents[1]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=root, check=False)
            if done.returncode != (0 if until == STEPS else -signal.SIGKILL):
                raise RuntimeError(f"the run that was to be killed after step {until} ended by itself")
            last = json.loads(done.stdout.splitlines()[-1])
            seen |= last["data"]
    equal = last["digest"] == digest(cuts.end) and len(seen) == STEPS
    return {"kills": len(steps), "equal": equal and list(seen.values()) == list(cuts.data.values())}


def child(folder: str, workers: int, until: int) -> int:
    """Go on from the newest checkpoint to a step; save there, and be killed."""
    run = Journey(folder, workers)
    run.resume()
    run.train(until=until if until < STEPS else None)
    if until < STEPS:
        run.manager.save(wait=True)
        print(json.dumps({"data": run.seen}), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"data": run.seen, "digest": digest(run.end())}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
