"""GradMax's student-teacher task: does growing beat the network that had the right size from the start?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks import compare, harness
from benchmarks.promises import Promise
from benchmarks.runs import Job, Result, run
from benchmarks.tasks import TASKS
from benchmarks.workers import workers

NAME = "student-teacher"
ARMS = ("fixed:small", "fixed", "gradmax", "gromo", "grown")
SAME = "fixed, same size"  # the fixed network with each grown run's own final width
FIGURES = ("train", "test")  # mean squared errors; the notebook reports the first
QUICK_EPOCHS = 150


def main(argv: Sequence[str]) -> int:
    """Run every arm at every rate on every seed; report each arm at the rate its probe error chose."""
    chosen = harness.options(NAME, __doc__, argv, seeds=20, arms=ARMS)
    task = TASKS[NAME]
    names = chosen.select(ARMS)
    rates = task.rates[:2] if chosen.quick else task.rates
    epochs = QUICK_EPOCHS if chosen.quick else None
    jobs = [
        Job(NAME, arm, seed, rate, epochs=epochs)
        for arm in names
        for rate in rates
        for seed in range(chosen.seeds)
    ]
    with workers(chosen.jobs) as pool:
        grid = compare.by_arm_and_rate(pool.map(run, jobs, NAME))
        best = compare.choose_rates(grid, task)
        arms = {arm: grid[arm, rate] for arm, rate in best.items()}
        if "grown" in arms and "fixed" in arms:
            same = [Job(NAME, "fixed", r.seed, best["fixed"], r.widths, epochs) for r in arms["grown"]]
            arms[SAME] = pool.map(run, same, "same size")
    tables = [
        compare.rate_table("Training MSE at every fixed rate (* chosen on the probe)", grid, best, "train"),
        compare.arm_table(f"MSE of {chosen.seeds} seeds, each arm at its rate", arms, FIGURES, "grown"),
    ]
    figures = {
        "grid": list(rates),
        "rates": best,
        "summary": compare.summary(arms, FIGURES, "grown"),
        "runs": [result.to_dict() for results in grid.values() for result in results],
    }
    return harness.conclude(NAME, chosen, tables, promises(arms), figures)


def promises(arms: dict[str, list[Result]]) -> list[Promise]:
    """Judge ``grown`` against the bound and against the best of the others."""
    error = {arm: compare.average(results, "train") for arm, results in arms.items()}
    grown = error.get("grown")
    fixed = min((error[arm] for arm in ("fixed:small", "fixed", SAME) if arm in error), default=None)
    gigaflops = compare.average(arms["grown"], "flops") / 1e9 if "grown" in arms else None
    return [
        Promise("grown: mean final training MSE", grown, "<=", 0.006),
        Promise("grown: below every fixed network at its best rate", grown, "<", fixed),
        Promise("grown: below GradMax at its best rate", grown, "<", error.get("gradmax")),
        Promise("grown: GFLOP in all, growth included", gigaflops, "<=", 1.80),
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
