"""Handwritten digits: do networks that grow match or beat networks of the same final size, for less work?"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType

from benchmarks import compare, harness, picture
from benchmarks.promises import Promise
from benchmarks.runs import Job, Result, run, side_by_side
from benchmarks.tasks import TASKS
from benchmarks.workers import Workers, workers

NAME = "digits"
HOSTS: dict[str, tuple[str, ...]] = {
    "digits-mlp": ("fixed:small", "fixed", "grown", "grown:seed", "grown:mean", "gromo"),
    "digits-cnn": ("fixed:small", "fixed", "grown", "grown:seed", "grown:mean"),
}
SAME = "fixed, same size"  # the fixed network with each grown run's own final widths
FIGURES = ("test", "train")
FIRST_SELECTION_SEED, SELECTION_SEEDS, TIMED_SEEDS, FRONTIER_SEEDS = 1000, 5, 5, 5
FRONTIER = {
    "digits-mlp": ((2,), (4,), (8,), (16,), (32,), (64,)),
    "digits-cnn": ((2, 4), (4, 8), (8, 16), (16, 32), (24, 48)),
}
QUICK_EPOCHS = 4


class Host:
    """Everything measured on one of the two networks."""

    def __init__(self, name: str, chosen: harness.Options, pool: Workers) -> None:
        self.name, self.task, self.pool = name, TASKS[name], pool
        self.quick = chosen.quick
        self.seeds = range(chosen.seeds)
        self.names = chosen.select(HOSTS[name])
        self.grid = self.select()
        self.rates = compare.choose_rates(self.grid, self.task)
        self.arms = self.report()
        self.frontier = self.draw_frontier() if "fixed" in self.names else {}
        self.ratios = self.time() if "grown" in self.names and "fixed" in self.names else []

    def job(self, arm: str, seed: int, rate: float, widths: tuple[int, ...] | None = None) -> Job:
        return Job(self.name, arm, seed, rate, widths, QUICK_EPOCHS if self.quick else None)

    def select(self) -> dict[tuple[str, float], list[Result]]:
        """Run every arm at every rate on seeds of their own, which are not reported."""
        count = 1 if self.quick else SELECTION_SEEDS
        rates = self.task.rates[2:4] if self.quick else self.task.rates
        seeds = range(FIRST_SELECTION_SEED, FIRST_SELECTION_SEED + count)
        jobs = [self.job(arm, seed, rate) for arm in self.names for rate in rates for seed in seeds]
        return compare.by_arm_and_rate(self.pool.map(run, jobs, f"{self.name}: rates"))

    def report(self) -> dict[str, list[Result]]:
        """Run every arm at its rate on the reported seeds, then the fixed network as wide as the grown."""
        jobs = [self.job(arm, seed, self.rates[arm]) for arm in self.names for seed in self.seeds]
        results = self.pool.map(run, jobs, f"{self.name}: report")
        arms = {arm: [result for result in results if result.arm == arm] for arm in self.names}
        if "grown" in arms and "fixed" in arms:
            known = {(result.seed, result.widths): result for result in arms["fixed"]}
            missing = [grown for grown in arms["grown"] if (grown.seed, grown.widths) not in known]
            jobs = [self.job("fixed", grown.seed, self.rates["fixed"], grown.widths) for grown in missing]
            for result in self.pool.map(run, jobs, f"{self.name}: same size"):
                known[result.seed, result.widths] = result
            arms[SAME] = [known[grown.seed, grown.widths] for grown in arms["grown"]]
        return arms

    def draw_frontier(self) -> dict[tuple[int, ...], list[Result]]:
        """Train fixed networks of other widths, for the picture."""
        widths = FRONTIER[self.name][:2] if self.quick else FRONTIER[self.name]
        seeds = self.seeds[:FRONTIER_SEEDS]
        jobs = [self.job("fixed", seed, self.rates["fixed"], width) for width in widths for seed in seeds]
        results = self.pool.map(run, jobs, f"{self.name}: frontier")
        return {width: [result for result in results if result.widths == width] for width in widths}

    def time(self) -> list[float]:
        """Divide the seconds of growing by those of the same-size network, trained in turns beside it."""
        jobs = []
        for grown in self.arms["grown"][:TIMED_SEEDS]:
            same = self.job("fixed", grown.seed, self.rates["fixed"], grown.widths)
            jobs.append((self.job("grown", grown.seed, self.rates["grown"]), same))
        timed = self.pool.one_at_a_time(side_by_side, jobs, f"{self.name}: wall time")
        return [grown / fixed for grown, fixed in timed]

    def tables(self) -> list[RenderableType]:
        rates = f"{self.name}: test accuracy at every fixed rate, selection seeds (* chosen on the probe)"
        arms = f"{self.name}: accuracy, {len(self.seeds)} seeds, each arm at its rate"
        return [
            compare.rate_table(rates, self.grid, self.rates, "test"),
            compare.arm_table(arms, self.arms, FIGURES, SAME),
        ]

    def figures(self) -> dict[str, Any]:
        return {
            "grid": sorted({rate for _, rate in self.grid}),
            "rates": self.rates,
            "summary": compare.summary(self.arms, FIGURES, SAME),
            "wall_ratios": self.ratios,
            "selection": [result.to_dict() for results in self.grid.values() for result in results],
            "runs": {arm: [result.to_dict() for result in results] for arm, results in self.arms.items()},
            "curves": {arm: picture.trajectory(results) for arm, results in self.arms.items()},
            "frontier": [result.to_dict() for results in self.frontier.values() for result in results],
        }


def main(argv: Sequence[str]) -> int:
    """Choose rates, run every arm on every seed, time the two that are compared, and draw the pictures."""
    chosen = harness.options(NAME, __doc__, argv, seeds=20, arms=HOSTS["digits-mlp"])
    with workers(chosen.jobs) as pool:
        hosts = {name: Host(name, chosen, pool) for name in HOSTS}
    for name, host in hosts.items():
        picture.draw(chosen.out / name, host.task, host.arms, host.frontier)
    shown = [table for host in hosts.values() for table in host.tables()]
    figures = {name: host.figures() for name, host in hosts.items()}
    return harness.conclude(NAME, chosen, shown, promises(hosts), figures)


def promises(hosts: Mapping[str, Host]) -> list[Promise]:
    """Judge both networks against the fixed ones of the same final size."""
    mlp, cnn = hosts["digits-mlp"], hosts["digits-cnn"]
    better = compare.paired(mlp.arms["grown"], mlp.arms[SAME], "test") if SAME in mlp.arms else None
    close = compare.paired(cnn.arms["grown"], cnn.arms[SAME], "test") if SAME in cnn.arms else None
    return [
        Promise("MLP: accuracy, grown − fixed of the same size, paired", better and better.mean, ">", 0.0),
        Promise("MLP: FLOPs, grown / fixed of the same size", flop_ratio(mlp), "<=", 0.75),
        Promise("MLP: wall time, grown / fixed of the same size", wall_ratio(mlp), "<=", 1.2),
        Promise("CNN: the same difference, lower 95 % end", close and close.low, ">=", -0.003),
        Promise("CNN: FLOPs, grown / fixed of the same size", flop_ratio(cnn), "<=", 0.70),
        Promise("CNN: wall time, grown / fixed of the same size", wall_ratio(cnn), "<=", 1.2),
    ]


def flop_ratio(host: Host) -> float | None:
    if SAME not in host.arms:
        return None
    return compare.average(host.arms["grown"], "flops") / compare.average(host.arms[SAME], "flops")


def wall_ratio(host: Host) -> float | None:
    return statistics.median(host.ratios) if host.ratios else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
