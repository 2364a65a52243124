"""Where more units cannot help, does growth leave the network alone?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import compare, harness
from benchmarks.promises import Promise
from benchmarks.runs import Job, Result, run
from benchmarks.tasks import TASKS
from benchmarks.workers import workers

NAME = "no-harm"
HOSTS = ("breast-cancer", "shuffled-digits")
ARMS = ("grown", "fixed:small")  # the second is the first's twin: same data, order and weights, no growth
RATE = 1e-2  # the middle of the digits grid; both arms share it, or they would not be twins
FIGURES = ("test", "test_loss", "train")
QUICK_EPOCHS = 6


def main(argv: Sequence[str]) -> int:
    """Train each host with growth and its twin without, on the same seeds; count what was kept."""
    chosen = harness.options(NAME, __doc__, argv, seeds=10, arms=ARMS)
    epochs = QUICK_EPOCHS if chosen.quick else None
    seeds = range(chosen.seeds)
    names = chosen.select(ARMS)
    shown, judged, figures = [], [], {}
    with workers(chosen.jobs) as pool:
        for host in HOSTS:
            jobs = [Job(host, arm, seed, RATE, epochs=epochs) for arm in names for seed in seeds]
            results = pool.map(run, jobs, host)
            arms = {arm: [result for result in results if result.arm == arm] for arm in names}
            widths = "–".join(str(width) for width in TASKS[host].small)
            title = f"{host}, hidden width {widths}, {chosen.seeds} seeds: accuracy"
            shown.append(compare.arm_table(title, arms, FIGURES, "fixed:small"))
            judged += promises(host, arms)
            figures[host] = {
                "summary": compare.summary(arms, FIGURES, "fixed:small"),
                "runs": [result.to_dict() for result in results],
            }
    return harness.conclude(NAME, chosen, shown, judged, {"rate": RATE, **figures})


def promises(host: str, arms: dict[str, list[Result]]) -> list[Promise]:
    """Judge kept widenings, the final metric, and that a run that kept nothing is its twin bit for bit."""
    kept = difference = touched = None
    if "grown" in arms:
        kept = sum(result.growths > 0 for result in arms["grown"])
    if len(arms) == len(ARMS):
        difference = compare.paired(arms["grown"], arms["fixed:small"], "test").mean
        pairs = zip(arms["grown"], arms["fixed:small"], strict=True)
        touched = sum(a.growths == 0 and a.test_loss != b.test_loss for a, b in pairs)
    return [
        Promise(f"{host}: runs that kept a widening", kept, "<=", 1, digits=0),
        Promise(f"{host}: test accuracy, grown − twin", difference, ">=", -0.005),
        Promise(f"{host}: runs that kept nothing yet differ from their twin", touched, "<=", 0, digits=0),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
