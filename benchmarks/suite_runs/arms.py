"""The ways a task is trained, and the order in which one part of the suite (a task, a schedule) runs them.

small          the size growth starts at, no growth: grown's twin
grown          ``esper.grow`` on its defaults; the budget is the full network's parameters
same           fixed at the size the grown run of the same seed ended with, full length
full           fixed at full size, full length
equal          fixed at full size for as many steps as cost grown's mean FLOPs, its schedule fitted to them;
               at most twice the full length
ladder-K       fixed at the K-th size from small to full; ``small`` and ``full`` are its ends
gromo          the gromo package, where it is installed and can train the task

Every arm's rate is the best of the task's one grid by the mean probe metric of four seeds that are not
reported; then each arm runs once per reported seed. ``grown``, ``same`` and ``full`` of a seed run one after
the other in one process, in turns of order, so that their wall times met the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.intervals import mean_of
from benchmarks.suite_runs import comparator
from benchmarks.suite_runs.training import Run, Training, train
from benchmarks.suite_tasks import TASKS, Schedule, Size, SuiteTask
from benchmarks.workers import Workers
from esper.errors import LossError

FIRST_SEED = 100  # of what is reported; Esper's defaults were chosen on seeds below
SELECTION_SEEDS = (1000, 1001, 1002, 1003)  # of two, one rate in four was another (ViT)
POINTS = 12  # of a reported run's curve
QUICK_STEPS = 24
LONGEST = 2  # full lengths: more would take hours where growth on a tiny host costs many times the training
Grid = dict[str, dict[float, list[Run]]]


@dataclass(frozen=True)
class Job:
    """What a worker needs to know: names and numbers."""

    task: str
    arm: str
    seed: int
    rate: float
    schedule: Schedule
    size: Size | None  # None: grown's, of the job before it in its group
    steps: int | None = None
    points: int = 1


def run(job: Job) -> Run:
    """Train one arm; a run that growth refuses to go on with, since its loss is not finite, scores NaN."""
    task = TASKS[job.task]
    if job.size is None:
        raise ValueError(f"{job.arm} of {job.task} needs a size: it follows a grown run in a group")
    if job.arm == comparator.NAME:
        return comparator.train(task, job.seed, job.rate, job.steps or task.steps)
    net = task.build(job.size, job.seed)
    grow = {} if job.arm == "grown" else None
    try:
        return train(task, net, job.seed, job.rate, job.schedule, grow, job.steps, job.points)
    except LossError:
        twin = Training(
            task, task.build(job.size, job.seed), job.seed, job.rate, job.schedule, None, 1
        ).result()
        return replace(twin, probe=math.nan, probe_loss=math.nan, test=math.nan, test_loss=math.nan)


def group(jobs: tuple[Job, ...]) -> dict[str, Run]:
    """Train several arms one after the other; ``same`` takes the size of the grown run before it."""
    done: dict[str, Run] = {}
    for job in jobs:
        size = done["grown"].size if job.arm == "same" else job.size
        if size is not None:  # a grown net that counts do not describe has no fixed twin
            done[job.arm] = run(replace(job, size=size))
    return done


@dataclass
class Part:
    """One task under one schedule: chooses rates, then runs every arm on every reported seed."""

    task: SuiteTask
    schedule: Schedule
    seeds: Sequence[int]
    pool: Workers
    quick: bool = False
    grid: Grid = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    runs: dict[str, list[Run]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, Size]:
        """The arms that are known before anything ran, each with the size it starts at."""
        between = {f"ladder-{k}": size for k, size in enumerate(self.task.sizes[1:-1], start=1)}
        known = {"small": self.task.small, "grown": self.task.small, "full": self.task.full, **between}
        return known | ({"gromo": self.task.small} if comparator.fits(self.task, self.schedule) else {})

    @property
    def steps(self) -> int:
        return QUICK_STEPS if self.quick else self.task.steps

    @property
    def selection(self) -> Sequence[int]:
        return SELECTION_SEEDS[:1] if self.quick else SELECTION_SEEDS

    def job(
        self, arm: str, seed: int, size: Size | None, rate: float | None = None, steps: int | None = None
    ) -> Job:
        """Make a job: of the selection where a rate is given, else a reported one at the chosen rate."""
        points = POINTS if rate is None and not self.quick else 1
        chosen = self.rates[arm] if rate is None else rate
        return Job(self.task.name, arm, seed, chosen, self.schedule, size, steps or self.steps, points)

    def choose(self, sizes: Mapping[str, Mapping[int, Size | None]], steps: int | None = None) -> None:
        """Choose arms' rates; ``sizes`` says per arm and selection seed what is trained."""
        rates = self.task.rates[:1] if self.quick else self.task.rates
        jobs = [
            self.job(arm, seed, size, rate, steps)
            for seed in self.selection
            for rate in rates
            for arm, by_seed in sizes.items()
            if (size := by_seed[seed]) is not None
        ]
        title = f"{self.task.name}, {self.schedule}: rates of {', '.join(sizes)}"
        for job, done in zip(jobs, self.pool.map(run, jobs, title), strict=True):
            self.grid.setdefault(job.arm, {}).setdefault(job.rate, []).append(done)
        for arm in sizes:
            if arm in self.grid:
                self.rates[arm] = best_rate(self.grid[arm], self.task.higher_is_better)

    def run(self) -> Part:
        """Run everything; the order is the docstring's of this file."""
        self.choose({arm: dict.fromkeys(self.selection, size) for arm, size in self.sizes.items()})
        grown = self.grid["grown"][self.rates["grown"]]
        self.choose({"same": {found.seed: found.size for found in grown}})
        self.choose({"equal": dict.fromkeys(self.selection, self.task.full)}, self.equal_steps(grown))
        groups = [self.turns(seed) for seed in self.seeds]
        for done in self.pool.map(group, groups, f"{self.task.name}, {self.schedule}: grown and fixed"):
            for arm, figures in done.items():
                self.runs.setdefault(arm, []).append(figures)
        rest = [
            self.job(arm, seed, size)
            for seed in self.seeds
            for arm, size in self.sizes.items()
            if arm not in ("grown", "full")
        ]
        steps = self.equal_steps(self.runs["grown"])
        rest += [self.job("equal", seed, self.task.full, steps=steps) for seed in self.seeds]
        title = f"{self.task.name}, {self.schedule}: ladder and equal compute"
        for job, figures in zip(rest, self.pool.map(run, rest, title), strict=True):
            self.runs.setdefault(job.arm, []).append(figures)
        return self

    def turns(self, seed: int) -> tuple[Job, ...]:
        """Order the arms whose wall times are compared; with every other seed the full one goes first."""
        full = self.job("full", seed, self.task.full)
        grown = [self.job("grown", seed, self.task.small)]
        if "same" in self.rates:
            grown.append(self.job("same", seed, None))
        return (full, *grown) if seed % 2 else (*grown, full)

    def equal_steps(self, grown: Sequence[Run]) -> int:
        """Return how many steps of the full network cost what these grown runs did on average."""
        full = (self.runs.get("full") or self.grid["full"][self.rates["full"]])[0]
        mean = mean_of([run.flops for run in grown]).mean
        return min(max(2, round(mean / (full.flops / full.steps))), LONGEST * self.steps)


def best_rate(by_rate: Mapping[float, Sequence[Run]], higher_is_better: bool) -> float:
    """Return the rate of the best mean probe metric, the lower probe loss where two are level."""

    def score(rate: float) -> tuple[float, float]:
        metric = mean_of([run.probe for run in by_rate[rate]]).mean
        loss = mean_of([run.probe_loss for run in by_rate[rate]]).mean
        if math.isnan(metric) or math.isnan(loss):
            return -math.inf, -math.inf  # a run that diverged is the worst there is
        return (metric if higher_is_better else -metric), -loss

    return max(by_rate, key=score)
