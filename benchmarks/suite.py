"""One setting, twelve tasks: what growth on its defaults costs and reaches against every fixed alternative.

Nothing is tuned per task: the grown arm is ``esper.grow`` with the full network's parameters as its budget.
Each part, a task under a schedule of its learning rate, writes ``<out>/suite/<task>-<schedule>.json``;
``--join`` prints the tables and the promises from the parts that exist, ``--picture`` draws them and
``--markdown`` prints the table in README.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import harness
from benchmarks.suite_runs import files, joining, markdown, picture
from benchmarks.suite_runs.arms import FIRST_SEED, Part
from benchmarks.suite_runs.files import Record
from benchmarks.suite_tasks import SCHEDULES, TASKS, Schedule, SuiteTask
from benchmarks.workers import workers

NAME = "suite"
PICTURE = Path("docs") / "suite"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"esper bench {NAME}", description=__doc__)
    parser.add_argument("--tasks", type=names, default=[], help="only these, by comma: " + ", ".join(TASKS))
    parser.add_argument("--schedule", choices=SCHEDULES, help="only this one; else each task's own")
    parser.add_argument(
        "--seeds", type=int, help="reported seeds, from 100 up (10, or 5 where a run is long)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: 2 seeds, few steps, nothing is judged"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (2); 0 runs in this one")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="where JSON goes")
    parser.add_argument("--join", action="store_true", help="run nothing: judge the parts that exist")
    parser.add_argument("--picture", action="store_true", help="run nothing: draw the parts that exist")
    parser.add_argument("--markdown", action="store_true", help="run nothing: print README's table")
    parser.add_argument("--picture-path", type=Path, default=PICTURE, help=f"without suffix ({PICTURE})")
    given = parser.parse_args(argv)
    if (given.seeds is not None and given.seeds < 1) or given.jobs < 0:
        parser.error("--seeds must be at least 1 and --jobs at least 0")
    if unknown := set(given.tasks) - set(TASKS):
        parser.error(f"no task {', '.join(sorted(unknown))}; known: {', '.join(TASKS)}")
    return given


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main(argv: Sequence[str]) -> int:
    """Run the parts asked for and judge them, or join what is there."""
    given = parse(argv)
    folder = given.out / files.FOLDER
    if given.join or given.picture or given.markdown:
        records = [record for record in files.read(folder) if wanted(record, given)]
        if not records:
            print(f"no part in {folder}: run `esper bench {NAME} --tasks NAME` first", file=sys.stderr)
            return 1
    else:
        records = run_parts(given, folder)
    if given.picture:
        print(*picture.draw(given.picture_path, records), sep="\n")
        return 0
    if given.markdown:
        print(markdown.table(records))
        return 0
    return conclude(given, records)


def wanted(record: Record, given: argparse.Namespace) -> bool:
    chosen = not given.tasks or record.task.name in given.tasks
    return chosen and record.quick == given.quick and given.schedule in (None, record.schedule)


def parts(given: argparse.Namespace) -> list[tuple[SuiteTask, Schedule]]:
    tasks = [TASKS[name] for name in given.tasks or TASKS]
    return [(task, s) for task in tasks for s in ((given.schedule,) if given.schedule else task.schedules)]


def run_parts(given: argparse.Namespace, folder: Path) -> list[Record]:
    """Run parts one after the other; each is on file before the next begins."""
    written = []
    with workers(given.jobs) as pool:
        for task, schedule in parts(given):
            count = given.seeds or (2 if given.quick else task.seeds)
            seeds = range(FIRST_SEED, FIRST_SEED + count)
            part = Part(task, schedule, seeds, pool, given.quick).run()
            written.append((task.name, schedule))
            files.write(part, folder, given.jobs)
    return [record for record in files.read(folder) if (record.task.name, record.schedule) in written]


def conclude(given: argparse.Namespace, records: Sequence[Record]) -> int:
    """Print every part and the summary; judge what was promised."""
    seeds = max(len(record.seeds) for record in records)
    chosen = harness.Options(seeds, given.quick, given.json, given.jobs, given.out, None)
    shown = [*(joining.part_table(record) for record in records), joining.summary_table(records)]
    if not given.json:
        Console(stderr=True).print(f"{len(records)} parts of {sum(len(t.schedules) for t in TASKS.values())}")
    figures = {"parts": joining.figures(records)}
    return harness.conclude(NAME, chosen, shown, joining.promises(records, whole=given.join), figures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
