"""Do the tests of the files that guard data and evidence notice when one thing in them is changed?"""

from __future__ import annotations

import argparse
import itertools
import queue
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from benchmarks import compare, harness
from benchmarks.equivalents import EQUIVALENT
from benchmarks.mutations import Mutation, mutations
from benchmarks.nursery import ROOT, Ending, Nursery, Trial, Verdict
from benchmarks.promises import Promise
from benchmarks.tried import Tried
from benchmarks.workers import progress

NAME = "mutants"
COUNT = 25  # mutants a file
QUICK = 2
KILLED = 0.92  # of those that are not equivalent
LIMIT = 600.0, 3600.0  # seconds of the unchanged tests, on a CPU and of a clock
SURGERY, CHECKPOINT, TAMIYO = "tests/surgery", "tests/checkpoint", "tests/tamiyo"
FILES: dict[
    str, tuple[str, ...]
] = {  # what guards data and evidence; the tests that hold it, quick ones first
    "src/esper/surgery/widen_layers.py": (
        "tests/surgery/test_widened_tensors.py",
        "tests/surgery/test_materialise.py",
    ),
    "src/esper/batches/examples.py": ("tests/batches/test_examples.py", "tests/kasmina/test_evidence.py"),
    "src/esper/kasmina/evidence/significance.py": ("tests/kasmina/test_significance.py",),
    "src/esper/kasmina/evidence/e_values.py": ("tests/kasmina/test_evidence.py",),
    "src/esper/kasmina/race/gate.py": (
        "tests/kasmina/test_gate.py",
        "tests/kasmina/test_gate_boundaries.py",
    ),
    "src/esper/kasmina/race/exposing.py": (
        "tests/kasmina/test_trial.py",
        "tests/kasmina/test_several.py",
        "tests/kasmina/test_stage_limits.py",
        "tests/kasmina/test_orchestrator.py",
        "-k not resumed",
    ),
    "src/esper/kasmina/race/racing.py": (
        "tests/kasmina/test_lessons.py",
        "tests/kasmina/test_several.py",
        "tests/kasmina/test_stage_limits.py",
        "tests/kasmina/test_orchestrator.py",
        "-k not resumed",
    ),
    "src/esper/kasmina/race/orchestrator.py": (
        "tests/kasmina/test_several.py",
        "tests/kasmina/test_stage_limits.py",
        "tests/kasmina/test_orchestrator.py",
        "-k not resumed",  # 9 of their 25 seconds
    ),
    "src/esper/kasmina/sites/selecting.py": ("tests/kasmina/test_selecting.py",),
    "src/esper/tolaria/growth/early/verdicts.py": ("tests/tolaria/test_verdicts.py",),
    "src/esper/tolaria/growth/early/judged.py": ("tests/tolaria/test_judged.py",),
    "src/esper/tolaria/growth/early/judging.py": ("tests/tolaria/test_judging.py",),
    "src/esper/surgery/optimizers/adoption.py": (f"{SURGERY}/test_adoption.py", f"{SURGERY}/test_own.py"),
    "src/esper/surgery/optimizers/widening.py": tuple(
        f"{SURGERY}/test_{name}.py" for name in ("optimizers", "kinds", "averages", "matrix")
    ),
    "src/esper/kasmina/race/own_optimizers.py": (f"{SURGERY}/test_own.py",),
    "src/esper/surgery/optimizers/kinds.py": tuple(
        f"{SURGERY}/test_{name}.py" for name in ("kinds", "own", "matrix")
    ),
    "src/esper/checkpoint/format/manifest.py": tuple(
        f"{CHECKPOINT}/test_{name}.py" for name in ("format", "encoding", "checking", "checkpoints")
    ),
    "src/esper/storage/folder.py": (
        "tests/storage/test_folder.py",
        f"{CHECKPOINT}/test_format.py",
    ),
    "src/esper/checkpoint/format/checking.py": (
        f"{CHECKPOINT}/test_contents.py",
        f"{CHECKPOINT}/test_checking.py",
    ),
    "src/esper/tezzeret/container.py": ("tests/tezzeret/test_container.py",),
    "src/esper/nissa/run/journal.py": tuple(
        f"tests/nissa/test_{name}.py" for name in ("journal", "lease", "survival")
    ),
    "src/esper/tamiyo/selector.py": (f"{TAMIYO}/test_selector.py", f"{TAMIYO}/test_ucb.py"),
    "src/esper/tamiyo/bandits/ucb.py": (f"{TAMIYO}/test_ucb.py", f"{TAMIYO}/test_selector.py"),
}


@dataclass
class Tally:
    """What became of one file's mutants."""

    path: str
    changes: int  # that can be made
    seconds: float  # of its unchanged tests
    equivalent: list[Mutation] = field(default_factory=list)
    killed: list[Mutation] = field(default_factory=list)
    survived: list[Mutation] = field(default_factory=list)
    timed_out: list[Mutation] = field(default_factory=list)  # of the killed: endless, or stuck
    late: list[Mutation] = field(default_factory=list)  # by the clock: no verdict, and not counted

    @property
    def tried(self) -> int:
        return len(self.killed) + len(self.survived)

    @property
    def everything(self) -> bool:
        """Whether no change is left to try."""
        return self.tried + len(self.equivalent) == self.changes

    @property
    def share(self) -> float | None:
        return len(self.killed) / self.tried if self.tried else None

    def count(self, one: Mutation, verdict: Verdict) -> str:
        """Put a mutant where it belongs, and name that."""
        if verdict.ending == Ending.LATE:
            self.late.append(one)
            return "late"
        if verdict.code == 0:
            self.survived.append(one)
            return "SURVIVED"
        self.killed.append(one)
        if verdict.code is None:
            self.timed_out.append(one)
            return f"killed, {verdict.ending}"
        return "killed"

    def to_dict(self) -> dict[str, Any]:
        kinds = ("equivalent", "killed", "survived", "timed_out", "late")
        lists = {kind: [[m.line, m.text, m.change] for m in getattr(self, kind)] for kind in kinds}
        return {"changes": self.changes, "seconds": self.seconds, "killed_share": self.share, **lists}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"esper bench {NAME}", description=__doc__)
    parser.add_argument("--file", action="append", default=[], help="only paths that end so; repeatable")
    parser.add_argument("--seed", type=int, default=1, help="of the draw (1)")
    parser.add_argument("--count", type=int, help=f"mutants a file, equivalent ones not counted ({COUNT})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} a file; nothing is judged")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests (2)")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="where the JSON goes")
    given = parser.parse_args(argv)
    given.count = given.count if given.count is not None else (QUICK if given.quick else COUNT)
    if given.count < 1 or given.jobs < 1:
        parser.error("--count and --jobs must be at least 1")
    given.files = [path for path in FILES if not given.file or path.endswith(tuple(given.file))]
    if unknown := [name for name in given.file if not any(path.endswith(name) for path in FILES)]:
        parser.error(f"no file {', '.join(unknown)}; known: {', '.join(FILES)}")
    return given


def main(argv: Sequence[str]) -> int:
    """Change one thing at a time and run the file's tests; what survives is listed."""
    given = parse(argv)
    with Runs(given.jobs, ROOT, given.out / "mutants-tried.jsonl") as runs:
        tallies = [judge(runs, ROOT, path, FILES[path], given.seed, given.count) for path in given.files]
    return report(given, tallies)


class Runs:
    """As many nurseries as may run tests at the same time; what is in the file of verdicts is not run."""

    def __init__(self, jobs: int, root: Path = ROOT, verdicts: Path | None = None) -> None:
        self.tried = Tried(root, verdicts)
        self.free: queue.SimpleQueue[Nursery] = queue.SimpleQueue()
        self.all = [Nursery(root) for _ in range(jobs)]
        for one in self.all:
            self.free.put(one)

    def __enter__(self) -> Runs:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.all:
            one.close()

    def one(self, trial: Trial) -> Verdict:
        if (known := self.tried.get(trial)) is not None:
            return known
        nursery = self.free.get()
        try:
            verdict = nursery.run(trial)
        finally:
            self.free.put(nursery)
        self.tried.put(trial, verdict)
        return verdict

    def map(self, trials: Sequence[Trial]) -> Iterator[Verdict]:
        with ThreadPoolExecutor(len(self.all)) as pool:
            yield from pool.map(self.one, trials)


def judge(runs: Runs, root: Path, path: str, tests: tuple[str, ...], seed: int, count: int) -> Tally:
    """Draw one file's mutants and run its tests on each.

    Raises:
        ValueError: The tests do not pass on the file as it is.
    """
    source = (root / path).read_text(encoding="utf-8")
    unchanged = runs.one(Trial(path, source, tests, *LIMIT))
    if unchanged.code != 0:
        raise ValueError(f"{path}: its tests do not pass unchanged:\n{unchanged.said}")
    possible = mutations(source)
    tally = Tally(path, len(possible), unchanged.cpu)
    chosen, tally.equivalent = draw(possible, EQUIVALENT.get(path, {}), seed, count)
    limits = 3 * unchanged.cpu + 10, 20 * unchanged.seconds + 600
    verdicts = runs.map([Trial(path, one.apply(source), tests, *limits) for one in chosen])
    for number, (one, verdict) in enumerate(zip(chosen, verdicts, strict=True), 1):
        end = tally.count(one, verdict)
        by = re.findall(r"^(?:FAILED|ERROR) (\S+)", verdict.said, re.MULTILINE)
        said = f"{number}/{len(chosen)} {end}, {verdict.cpu:.0f} CPU-s"
        progress.print(Text(f"{path}:{one.line} {one.change}\n    {said} {' '.join(by[:1])}"), soft_wrap=True)
    return tally


def draw(
    possible: Sequence[Mutation], equivalent: Iterable[tuple[str, str, str]], seed: int, count: int
) -> tuple[list[Mutation], list[Mutation]]:
    """Draw mutants until so many are worth a run; those judged equivalent on the way come second."""
    skipped = set(equivalent)
    order = random.Random(seed).sample(possible, len(possible))
    worth = [one for one in order if one.key not in skipped][:count]
    last = order.index(worth[-1]) if len(worth) == count else len(order)
    passed = [one for one in itertools.islice(order, last) if one.key in skipped]
    return sorted(worth, key=lambda one: one.start), sorted(passed, key=lambda one: one.start)


def report(given: argparse.Namespace, tallies: Sequence[Tally]) -> int:
    """Print killed of tried, and every survivor."""
    columns = [
        "file",
        "changes",
        "tried",
        "killed",
        "by time",
        "equivalent",
        "survived",
        "late",
        "%",
        "CPU-s",
    ]
    table = compare.titled(f"Mutants, seed {given.seed}", columns)
    for tally in tallies:
        kinds = (tally.killed, tally.timed_out, tally.equivalent, tally.survived, tally.late)
        counts = (tally.changes, tally.tried, *map(len, kinds))
        share = "–" if tally.share is None else f"{100 * tally.share:.0f}"
        table.add_row(tally.path, *map(str, counts), share, f"{tally.seconds:.1f}")
    alive = [f"survived {told(tally.path, one)}" for tally in tallies for one in tally.survived]
    alive += [f"late, run it again {told(tally.path, one)}" for tally in tallies for one in tally.late]
    tried = sum(tally.tried for tally in tallies)
    killed = sum(len(tally.killed) for tally in tallies)
    worst = min((tally.share for tally in tallies if tally.share is not None), default=None)
    fewest = min(COUNT if tally.everything else tally.tried for tally in tallies)
    judged = [
        Promise("mutants a file, the fewest, or all there are", fewest, ">=", COUNT, digits=0),
        Promise("killed of all that are not equivalent", killed / tried if tried else None, ">=", KILLED),
        Promise("killed, the worst file", worst, ">=", KILLED),
    ]
    figures = {"seed": given.seed, "files": {tally.path: tally.to_dict() for tally in tallies}}
    chosen = harness.Options(1, given.quick, given.json, given.jobs, given.out, None)
    return harness.conclude(NAME, chosen, [table, *map(Text, alive)], judged, figures)


def told(path: str, one: Mutation) -> str:
    return f"{path}:{one.line} {one.within}\n    {one.text}\n    {one.change}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
