"""Does a blueprint's kernel beat widening and not growing, at equal added parameters?

Four hosts (benchmarks/blueprint_tasks.py) too small for their data: digits shifted at random, as vectors and
as pictures and as patches, and the next character of Python's manual. Each has a residual block whose pair
can be widened and beside which blueprints fit. Arms: ``none``, the twin that never grows; ``widen``; every
blueprint that fits.

What is compared is the kernel, so no race and no gate stand between: each arm plants one, early and at the
same step, as large as the same number of parameters allows (column ``added``). It adds zero at birth, becomes
part of the host by the product's own commit, and learns with it. In a first run every arm went through race
and gate; most kernels were refused, and what was compared was the gate (docs/decisions.md).

Every arm takes its learning rate from the same grid, by its mean probe loss on seeds of their own.

A blueprint wins a task if its test loss is below the twin's, the 95 % interval of the paired difference below
0, and its mean test loss is below widening's: beating nothing is not enough where widening does better. A
dozen blueprints are tried, so a win is a reason to offer a blueprint, not a proof. One that wins nowhere is
experimental. The only promise is that the catalogue says so.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from torch import Tensor

import esper
from benchmarks import compare, harness
from benchmarks.arms import Setup
from benchmarks.arms.fixed import Fixed
from benchmarks.arms.planted import Planted
from benchmarks.blueprint_tasks import BLOCKS, TASKS
from benchmarks.data import Split
from benchmarks.flops import parameters
from benchmarks.promises import Promise
from benchmarks.runs import Result, judge, predict
from benchmarks.tasks import Task
from benchmarks.workers import Workers, workers
from esper.blueprints import CATALOGUE
from esper.errors import SiteError

NAME = "blueprints"
NONE, WIDEN = "none", "widen"
ARMS = (NONE, WIDEN, *CATALOGUE.names())
FIGURES = ("test_loss", "test")
FIRST_SEED = 100  # seeds 0 to 4 were seen in the first run
FIRST_SELECTION_SEED, SELECTION_SEEDS = 1000, 1
QUICK_EPOCHS, QUICK_EXAMPLES = 1, 2048

Runs = Mapping[str, Sequence["Trained"]]  # of one task: an arm's runs, in the order of the seeds


@dataclass(frozen=True)
class Job:
    """One training of one arm."""

    task: str
    arm: str
    seed: int
    rate: float
    epochs: int | None = None  # a quick run's


@dataclass(frozen=True)
class Trained(Result):
    """A training's figures, with what was added."""

    added: int
    probe_loss: float


def train(job: Job) -> Trained:
    """Train one arm to the end."""
    task = TASKS[job.task]
    split = task.split(job.seed)
    if job.epochs is not None:
        task = replace(task, epochs=job.epochs)
        split = Split(
            *((x[:QUICK_EXAMPLES], y[:QUICK_EXAMPLES]) for x, y in (split.train, split.probe, split.test))
        )
    setup = Setup(task, split, job.seed, job.rate)
    began = time.perf_counter()
    after = max(task.epochs // 5, 1)
    arm = Fixed(setup, "small") if job.arm == NONE else Planted(setup, site(task, job.arm), after)
    for _ in arm.epochs():
        pass
    seconds = time.perf_counter() - began
    x, y = setup.split.probe
    own = parameters(task.build(task.small, job.seed))
    return Trained(
        **vars(judge(job.arm, arm, setup, seconds)),
        added=parameters(arm.net) - own,
        probe_loss=float(task.loss(predict(arm.net, x), y)),
    )


def site(task: Task, arm: str) -> str:
    """Name where an arm is planted: the pair of the task's block, or the block with the blueprint."""
    block = BLOCKS[task.name]
    return f"{block}.first>{block}.second" if arm == WIDEN else f"{block}+{arm}"


def fitting(task: Task) -> list[str]:
    """Name the arms that have a place in a task's host."""
    inputs = task.split(0).train[0][:2]
    return [NONE, *(arm for arm in ARMS if arm != NONE and fits(task, inputs, arm))]


def fits(task: Task, inputs: Tensor, arm: str) -> bool:
    try:
        esper.wrap(task.build(task.small, 0), inputs, sites=[site(task, arm)], blueprints=[arm])
    except SiteError:
        return False
    return True


def choose_rates(task: Task, arms: Sequence[str], pool: Workers, quick: bool) -> dict[str, float]:
    """Choose each arm's rate by its mean probe loss, on seeds that are not reported."""
    seeds = range(FIRST_SELECTION_SEED, FIRST_SELECTION_SEED + (1 if quick else SELECTION_SEEDS))
    epochs = QUICK_EPOCHS if quick else None
    rates = task.rates[:1] if quick else task.rates
    jobs = [Job(task.name, arm, seed, rate, epochs) for arm in arms for rate in rates for seed in seeds]
    losses: dict[tuple[str, float], list[float]] = {}
    for result in pool.map(train, jobs, f"{task.name}: rates"):
        losses.setdefault((result.arm, result.rate), []).append(result.probe_loss)
    return {arm: min(rates, key=lambda rate, arm=arm: statistics.fmean(losses[arm, rate])) for arm in arms}


def wins(arm: str, runs: Runs) -> bool | None:
    """Tell whether an arm won: surely better than the twin, and better than widening; None: not known."""
    if NONE not in runs or WIDEN not in runs:
        return None
    high = compare.paired(runs[arm], runs[NONE], "test_loss").high
    if high is None:
        return None
    return high < 0 and compare.average(runs[arm], "test_loss") < compare.average(runs[WIDEN], "test_loss")


def task_table(title: str, runs: Runs) -> Table:
    """Show every arm of a task."""
    heads = ["arm", "rate", "added", "test loss", "− none [95 %]", "− widen [95 %]", "accuracy"]
    table = compare.titled(title, [*heads, "GFLOP", "s", "wins"])
    for arm, results in runs.items():
        others = [runs[other] if other in runs and other != arm else None for other in (NONE, WIDEN)]
        table.add_row(
            arm,
            f"{results[0].rate:g}",
            f"{compare.average(results, 'added'):.0f}",
            compare.show(results, "test_loss"),
            *("" if o is None else compare.paired(results, o, "test_loss").show() for o in others),
            f"{compare.average(results, 'test'):.4f}",
            f"{compare.average(results, 'flops') / 1e9:.3f}",
            f"{compare.average(results, 'seconds'):.1f}",
            "wins" if arm not in (NONE, WIDEN) and wins(arm, runs) else "",
        )
    return table


def summary(runs: Runs) -> dict[str, Any]:
    """Say the same for a program."""
    record = compare.summary(runs, FIGURES, NONE)
    for arm, results in runs.items():
        record[arm]["added"] = compare.average(results, "added")
        if WIDEN in runs and arm != WIDEN:
            record[arm]["test_loss minus widen"] = vars(compare.paired(results, runs[WIDEN], "test_loss"))
        if arm not in (NONE, WIDEN):
            record[arm]["wins"] = wins(arm, runs)
    return record


def main(argv: Sequence[str]) -> int:
    """Choose each task's rate, run every arm that fits on every seed, and list who never wins."""
    chosen = harness.options(NAME, __doc__, argv, seeds=5, arms=ARMS)
    epochs = QUICK_EPOCHS if chosen.quick else None
    shown: list[RenderableType] = []
    figures: dict[str, Any] = {}
    by_task: dict[str, Runs] = {}
    with workers(chosen.jobs) as pool:
        for task in TASKS.values():
            names = [arm for arm in chosen.select(ARMS) if arm in fitting(task)]
            rates = choose_rates(task, names, pool, chosen.quick)
            seeds = range(FIRST_SEED, FIRST_SEED + chosen.seeds)
            jobs = [Job(task.name, arm, seed, rates[arm], epochs) for arm in names for seed in seeds]
            results = pool.map(train, jobs, task.name)
            runs = {arm: [result for result in results if result.arm == arm] for arm in names}
            by_task[task.name] = runs
            shown.append(task_table(f"{task.name}: {chosen.seeds} seeds, each arm at its best rate", runs))
            figures[task.name] = {
                "rates": rates,
                "summary": summary(runs),
                "runs": [result.to_dict() for result in results],
            }
    won = winners(by_task)
    figures["won"] = won
    never = [arm for arm, tasks in won.items() if not tasks]
    listed = [f"{arm} ({', '.join(tasks)})" for arm, tasks in won.items() if tasks]
    shown.append(f"won: {'; '.join(listed) or 'none'}")
    shown.append(f"never won, experimental: {', '.join(never) or 'none'}")
    return harness.conclude(
        NAME, chosen, shown, promises(won), {"won": won, "experimental": never, **figures}
    )


def winners(by_task: Mapping[str, Runs]) -> dict[str, list[str]]:
    """List the tasks that each blueprint won."""
    tried = [arm for arm in CATALOGUE.names() if any(arm in runs for runs in by_task.values())]
    return {arm: [task for task, runs in by_task.items() if arm in runs and wins(arm, runs)] for arm in tried}


def promises(won: Mapping[str, Sequence[str]]) -> list[Promise]:
    """Judge the catalogue: what never won is marked, or it would be offered on no evidence."""
    unmarked = [arm for arm, tasks in won.items() if not tasks and not CATALOGUE.get(arm).experimental]
    return [Promise("blueprints that never won and are not marked experimental", len(unmarked), "<=", 0, 0)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
