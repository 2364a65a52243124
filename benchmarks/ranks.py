"""Do the processes of a run stay the same while one is killed, stopped or delayed: 50 events of growth?"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import compare, harness, rank_gradients
from benchmarks.promises import Promise
from benchmarks.rank_runs import WORLD, Life, counted

NAME = "ranks"
EVENTS, STEPS = 50, 560  # 50 seeds are kept or culled well before the end
KILLS, STARTING, STOPS, DELAYS = 10, 2, 2, 8
QUICK = 72, (1, 0, 1, 1)  # steps; of each disturbance
DEADLINE = 8.0  # seconds of silence after which a process is given up; 30 by default
DELAY = 0.2, 0.5  # of the deadline
HANG = 30.0  # seconds


def main(argv: Sequence[str]) -> int:
    """Disturb one run of two processes again and again, compare what both did with an undisturbed run.

    A process is killed, stopped for good, or stopped for a while, at a random instant; where that ends the
    run, all processes are started again and go on from the newest checkpoint. Nobody helps the other process
    to its end: it has to notice by itself.
    """
    chosen = harness.options(NAME, __doc__, argv, seeds=1)
    steps, counts = QUICK if chosen.quick else (STEPS, (KILLS, STARTING, STOPS, DELAYS))
    folder = Path(tempfile.mkdtemp(prefix="esper-ranks-"))
    try:
        gradients = of_gradients(folder)
        disturbed = Disturbed(folder, steps, plan(steps, *counts)).endure()
    finally:
        shutil.rmtree(folder)
    worst = max(value for kinds in gradients.values() for value in kinds["float32"].values())
    events, longest = disturbed["events"], disturbed["longest"]
    judged = [
        Promise("seeds kept or culled", events["kept"] + events["culled"], ">=", EVENTS, digits=0),
        Promise("of them kept", events["kept"], ">=", EVENTS // 10, digits=0),
        Promise(
            "revisions that are not the same in every process", disturbed["different"], "<=", 0, digits=0
        ),
        Promise("final weights equal to the undisturbed run's", float(disturbed["equal"]), ">=", 1, digits=0),
        Promise("disturbances after which the run did not come back", disturbed["failed"], "<=", 0, digits=0),
        Promise("ends that nothing explains", len(disturbed["unexplained"]), "<=", 0, digits=0),
        Promise(f"hangs over {HANG:g} s", disturbed["hangs"], "<=", 0, digits=0),
        Promise("longest time without a step besides starting again, s", longest, "<=", HANG, digits=1),
        Promise("gradients: largest difference from one process, relative", worst, "<=", 1e-6, digits=8),
    ]
    shown = [*disturbed_tables(disturbed), gradient_table(gradients)]
    return harness.conclude(NAME, chosen, shown, judged, {"disturbed": disturbed, "gradients": gradients})


def of_gradients(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Compare gradients with those of one process; what both found."""
    (folder / "gradients").mkdir()
    life = Life(folder / "gradients", 0, [], rank_gradients.MODULE)
    life.outlive(range(WORLD), 120.0)
    assert life.clear() == [0] * WORLD, life.wrong()
    found = [json.loads(" ".join(life.end(rank))) for rank in range(WORLD)]
    return {
        name: {
            kind: {when: max(one[name][kind][when] for one in found) for when in whens}
            for kind, whens in kinds.items()
        }
        for name, kinds in found[0].items()
    }


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What is done to a process, and after which step."""

    step: int  # 0: while the processes start
    kind: str
    rank: int


def plan(steps: int, kills: int, starting: int, stops: int, delays: int) -> list[Disturbance]:
    """Spread disturbances at random over a run, each kind over both processes."""
    draw = random.Random(0)
    kinds = [*["killed"] * kills, *["stopped for good"] * stops, *["delayed"] * delays]
    made = [Disturbance(draw.randint(2, steps - 4), kind, i % WORLD) for i, kind in enumerate(kinds)]
    made.sort(key=lambda one: one.step)
    for number in range(starting):  # one right after another that has ended the run
        ends = [i for i, one in enumerate(made) if one.kind != "delayed"]
        after = made[ends[(number + 1) * len(ends) // (starting + 1)]]
        made.insert(made.index(after) + 1, Disturbance(0, "killed as it starts", number % WORLD))
    return made


@dataclass
class Disturbed:
    """One run in several lives.

    Args:
        folder: Of everything it writes.
        steps: Its length.
        plan: What is done to it.
    """

    folder: Path
    steps: int
    plan: list[Disturbance]
    lives: list[Life] = field(default_factory=list)
    draw: random.Random = field(default_factory=lambda: random.Random(1))
    noticed: dict[str, list[float]] = field(default_factory=dict)  # seconds until the others ended
    done: list[tuple[float, str]] = field(default_factory=list)  # when, what
    during: Counter[str] = field(default_factory=Counter)  # stages of the seeds it fell on
    codes: Counter[str] = field(default_factory=Counter)  # the others ended with
    unexplained: list[str] = field(default_factory=list)
    hangs: int = 0
    failed: int = 0

    def endure(self) -> dict[str, Any]:
        """Do all that is planned; compare with a run that nobody disturbed."""
        alone = self.begin("alone")
        if alone.outlive(range(WORLD), self.patience()) is None or any(alone.clear()):
            raise RuntimeError(f"the run that nobody disturbed did not end:\n{alone.wrong()}")
        for one in self.plan:
            self.carry_out(one)
        life = self.life()
        if life.outlive(range(WORLD), self.patience()) is None:
            self.hangs += 1
        if any(life.clear()):
            self.failed += 1
            self.unexplained.append(life.wrong())
        ends = [life.end(rank) for life in (alone, life) for rank in range(WORLD)]
        lines = [line for life in (alone, *self.lives) for rank in range(WORLD) for line in life.lines(rank)]
        hashes: dict[int, set[tuple[str, str, str]]] = {}
        for line in lines:
            hashes.setdefault(line.step, set()).add(line.hashes)
        events = counted(self.lives)
        return {
            "steps": self.steps,
            "lives": len(self.lives),
            "lines": len(lines),
            "revisions": len({line.hashes[0] for line in lines}),
            "events": {"kept": events["True"], "culled": events["False"]},
            "different": sum(len(found) > 1 for found in hashes.values()),
            "equal": bool(ends[0]) and all(end == ends[0] for end in ends),
            "parameters": int(ends[0][1]),
            "failed": self.failed,
            "unexplained": self.unexplained,
            "hangs": self.hangs,
            "noticed": self.noticed,
            "codes": dict(self.codes),
            "back": self.back(),
            "longest": self.longest(),
            "starts": [first - born for born, first in self.starts()],
            "during": dict(self.during),
            "counts": dict(Counter(kind for _, kind in self.done)),
        }

    def begin(self, name: str) -> Life:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return Life(folder, len(self.lives), [str(folder / "kept"), str(self.steps), str(DEADLINE)])

    def patience(self) -> float:
        """Return the seconds after which a run of this length hangs: no step takes half a second."""
        return 2 * HANG + 0.5 * self.steps

    def life(self) -> Life:
        """Return the present life; a new one where the last has ended."""
        if self.lives and self.lives[-1].over():
            ended = self.lives[-1]
            ended.outlive(range(WORLD), HANG)
            if any(ended.clear()) and not self.done_to(ended):
                self.unexplained.append(ended.wrong())
        if not self.lives or self.lives[-1].over():
            self.lives.append(self.begin("disturbed"))
        return self.lives[-1]

    def done_to(self, life: Life) -> bool:
        """Tell whether something that ends a run was done to this life."""
        return any(when > life.born and kind != "delayed" for when, kind in self.done)

    def carry_out(self, one: Disturbance) -> None:
        """Wait for the instant, do it, and see the others end by themselves."""
        life = self.life()
        if one.step and not life.reach(one.step, self.patience()):
            self.failed += 1
            self.unexplained.append(life.wrong())
            life.clear()
            return
        time.sleep(self.draw.uniform(0.0, 0.03) if one.step else self.draw.uniform(0.2, 2.0))
        told = life.lines(one.rank)
        if told:
            self.during.update(told[-1].stages.split("+"))
        others = [rank for rank in range(WORLD) if rank != one.rank]
        self.done.append((time.monotonic(), one.kind))
        if one.kind == "delayed":
            life.signal(one.rank, signal.SIGSTOP)
            time.sleep(DEADLINE * self.draw.uniform(*DELAY))
            life.signal(one.rank, signal.SIGCONT)
            return
        if one.kind == "killed as it starts":  # nobody knows it yet: who starts processes ends them
            life.clear()
            return
        life.signal(one.rank, signal.SIGSTOP if one.kind == "stopped for good" else signal.SIGKILL)
        took = life.outlive(others, HANG)
        if took is None:
            self.hangs += 1
        else:
            self.noticed.setdefault(one.kind, []).append(took)
        codes = life.clear()
        if took is not None:
            self.codes.update(str(codes[rank]) for rank in others)

    def steps_done(self) -> list[float]:
        """Return when each step of each process was done."""
        ranks = range(WORLD)
        return sorted(line.when for life in self.lives for rank in ranks for line in life.lines(rank))

    def back(self) -> dict[str, list[float]]:
        """Return, per kind, the seconds from each disturbance to the next step of the process."""
        steps = self.steps_done()
        found: dict[str, list[float]] = {}
        for when, kind in self.done:
            ahead = [later for later in steps if later > when + 0.05]  # the other one may end its step
            found.setdefault(kind, []).append(ahead[0] - when if ahead else float("inf"))
        return found

    def starts(self) -> list[tuple[float, float]]:
        """Return when each life was begun, and when it had done a step or the next one was begun."""
        found = []
        following = [life.born for life in self.lives[1:]] + [float("inf")]
        for life, end in zip(self.lives, following, strict=True):
            firsts = [lines[0].when for rank in range(WORLD) if (lines := life.lines(rank))]
            found.append((life.born, min(firsts, default=end)))
        return found

    def longest(self) -> float:
        """Return the longest time without a step of any process; the lives' own starts do not count."""
        steps, starts = self.steps_done(), self.starts()
        gaps = []
        for before, after in itertools.pairwise(steps):
            starting = sum(first - born for born, first in starts if before < born and first <= after)
            gaps.append(after - before - starting)
        return max(gaps, default=float("inf"))


def disturbed_tables(found: Mapping[str, Any]) -> list[Table]:
    """Show what was done, and what came of it."""
    table = compare.titled(
        f"{WORLD} processes, {found['steps']} steps, {found['revisions']} revisions, {found['lives']} lives; "
        f"a silent process is given up after {DEADLINE:g} s",
        [
            "a process was",
            "times",
            "s until the other ended: median",
            "most",
            "s to the next step: median",
            "most",
        ],
    )
    for kind, times in found["back"].items():
        noticed = found["noticed"].get(kind, [])
        table.add_row(kind, str(found["counts"][kind]), *middle_and_most(noticed), *middle_and_most(times))
    table.add_row("starting", str(len(found["starts"])), "–", "–", *middle_and_most(found["starts"]))
    stages = compare.titled("While a seed was", ["stage", "disturbances"])
    for stage, count in sorted(found["during"].items()):
        stages.add_row(stage, str(count))
    return [table, stages]


def middle_and_most(times: Sequence[float]) -> tuple[str, str]:
    """Show a median and a maximum; a dash where nothing was measured."""
    return (f"{statistics.median(times):.2f}", f"{max(times):.2f}") if times else ("–", "–")


def gradient_table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Show the largest relative difference of a gradient by DDP's options and time."""
    table = compare.titled(
        "Gradients of two processes, half a batch each, against one: largest relative difference",
        ["DistributedDataParallel with", "in", *rank_gradients.WHENS],
    )
    for name, kinds in found.items():
        for kind, whens in kinds.items():
            table.add_row(name, kind, *(f"{whens[when]:.1e}" for when in rank_gradients.WHENS))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
