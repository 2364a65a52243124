"""Does a blueprint's kernel beat widening and not growing, at equal added parameters?

Three hosts (benchmarks/blueprint_tasks.py) too small for their data: digits shifted at random, as vectors and
as pictures, and the next character of Python's manual. Each has residual blocks whose layers can be widened
and beside which blueprints fit. Arms: ``none``, the twin that never grows; ``widen``; every blueprint of the
catalogue that fits. All but the twin go the product's whole way (survey, race, gate, blend) in the same
places with the same budget: the parameters of the host with its pair at the task's ``big`` width, in at most
two decisions. Budgets are equal, what was added is not: a refused decision adds nothing, and the column
``added`` is to be read beside every difference. What was merged into a layer adds nothing either.

A task in which widening itself is refused (the first run's sequence task) tells nothing about blueprints.

All arms of a task share one learning rate, the twin's best on the probe of seeds of their own. So the arms of
one seed are the same run bit for bit until a kernel is let in: that is what makes differences of five seeds
tell anything.

A blueprint wins a task if its test loss is below the twin's, the 95 % interval of the paired difference below
0, and its mean test loss is below widening's: beating nothing is not enough where widening does better. The
second test is by the mean alone, and a dozen blueprints are tried: a win is a reason to offer a blueprint,
not a proof. One that wins nowhere is experimental. The only promise is that the catalogue says so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from torch import Tensor, nn

import esper
from benchmarks import compare, harness
from benchmarks.arms import Setup
from benchmarks.arms.fixed import Fixed
from benchmarks.arms.grown import Grown, probe_batches
from benchmarks.blueprint_tasks import PLACES, TASKS
from benchmarks.data import Split, stream
from benchmarks.flops import parameters
from benchmarks.promises import Promise
from benchmarks.runs import Result, predict
from benchmarks.tasks import Task, hidden_widths
from benchmarks.workers import Workers, workers
from esper.blueprints import CATALOGUE
from esper.contracts import Event
from esper.errors import SiteError

NAME = "blueprints"
NONE, WIDEN = "none", "widen"
ARMS = (NONE, WIDEN, *CATALOGUE.names())
FIGURES = ("test_loss", "test")
FIRST_SELECTION_SEED, SELECTION_SEEDS = 1000, 2
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
    """A training's figures, with what grew."""

    added: int
    grew: tuple[tuple[str, int], ...]  # place and parameters, in order
    culled: tuple[str, ...]  # why the other decisions came to nothing


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
    arm = Fixed(setup, "small") if job.arm == NONE else Grafted(setup, job.arm)
    for _ in arm.epochs():
        pass
    seconds = time.perf_counter() - began
    scores = [task.score(predict(arm.net, x), y) for x, y in (setup.split.train, setup.split.probe)]
    x, y = setup.split.test
    outputs = predict(arm.net, x)
    own = parameters(task.build(task.small, job.seed))
    return Trained(
        task=job.task,
        arm=job.arm,
        seed=job.seed,
        rate=job.rate,
        widths=hidden_widths(arm.net),
        parameters=parameters(arm.net),
        growths=arm.growths,
        train=scores[0],
        probe=scores[1],
        test=task.score(outputs, y),
        test_loss=float(task.loss(outputs, y)),
        training_flops=arm.training_flops,
        growth_flops=arm.growth_flops,
        seconds=seconds,
        curve=(),
        added=parameters(arm.net) - own,
        grew=tuple(arm.grew) if isinstance(arm, Grafted) else (),
        culled=tuple(arm.culled) if isinstance(arm, Grafted) else (),
    )


class Grafted(Grown):
    """``esper.grow`` with one blueprint on offer, or with widening alone."""

    def __init__(self, setup: Setup, blueprint: str) -> None:
        task = setup.task
        self.task = task
        self.net: nn.Module = task.build(task.small, setup.seed)
        self.optimizer = task.optimizer(self.net.parameters(), lr=setup.rate)
        self.batches = task.batches(setup.split, setup.seed)
        self.grew: list[tuple[str, int]] = []
        self.culled: list[str] = []
        own, limit = parameters(self.net), parameters(task.build(task.big, setup.seed))
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            self.loss,
            probe=probe_batches(setup),
            steps=task.epochs * len(self.batches),
            sites=PLACES[task.name],
            budget={"parameters": limit / own, "growth_events": task.events},
            config={**task.growth, "blueprints": [blueprint]},
            seed=stream(setup.seed, "growth"),
            on_event=self.note,
        )

    def note(self, event: Event) -> None:
        if event.kind == "outcome" and event.data["kept"]:
            self.grew.append((event.data["site"], event.data["parameters"]))
        elif event.kind == "outcome":
            self.culled.append(event.data["reason"])


def fitting(task: Task) -> list[str]:
    """Name the arms that have a place in a task's host."""
    inputs = task.split(0).train[0][:2]
    return [NONE, *(arm for arm in ARMS if arm != NONE and fits(task, inputs, arm))]


def fits(task: Task, inputs: Tensor, arm: str) -> bool:
    try:
        esper.wrap(task.build(task.small, 0), inputs, sites=PLACES[task.name], blueprints=[arm])
    except SiteError:
        return False
    return True


def choose_rate(task: Task, pool: Workers, quick: bool) -> tuple[float, list[Trained]]:
    """Choose the twin's rate by its mean probe score, on seeds that are not reported."""
    seeds = range(FIRST_SELECTION_SEED, FIRST_SELECTION_SEED + (1 if quick else SELECTION_SEEDS))
    epochs = QUICK_EPOCHS if quick else None
    jobs = [Job(task.name, NONE, seed, rate, epochs) for rate in task.rates for seed in seeds]
    results = pool.map(train, jobs, f"{task.name}: rates")
    return compare.choose_rates(compare.by_arm_and_rate(results), task)[NONE], results


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
    heads = ["arm", "kept", "runs", "added", "test loss", "− none [95 %]", "− widen [95 %]", "accuracy"]
    table = compare.titled(title, [*heads, "GFLOP", "of it growth", "s", "wins"])
    for arm, results in runs.items():
        others = [runs[other] if other in runs and other != arm else None for other in (NONE, WIDEN)]
        table.add_row(
            arm,
            "" if arm == NONE else f"{compare.average(results, 'growths'):.1f}",
            "" if arm == NONE else f"{sum(result.growths > 0 for result in results)}/{len(results)}",
            f"{compare.average(results, 'added'):.0f}",
            compare.show(results, "test_loss"),
            *("" if o is None else compare.paired(results, o, "test_loss").show() for o in others),
            f"{compare.average(results, 'test'):.4f}",
            f"{compare.average(results, 'flops') / 1e9:.3f}",
            f"{compare.average(results, 'growth_flops') / 1e9:.3f}",
            f"{compare.average(results, 'seconds'):.1f}",
            "wins" if arm not in (NONE, WIDEN) and wins(arm, runs) else "",
        )
    return table


def summary(runs: Runs) -> dict[str, Any]:
    """Say the same for a program."""
    record = compare.summary(runs, FIGURES, NONE)
    for arm, results in runs.items():
        record[arm]["added"] = compare.average(results, "added")
        record[arm]["runs_that_kept"] = sum(result.growths > 0 for result in results)
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
            rate, selection = choose_rate(task, pool, chosen.quick)
            names = [arm for arm in chosen.select(ARMS) if arm in fitting(task)]
            jobs = [Job(task.name, arm, seed, rate, epochs) for arm in names for seed in range(chosen.seeds)]
            results = pool.map(train, jobs, task.name)
            runs = {arm: [result for result in results if result.arm == arm] for arm in names}
            by_task[task.name] = runs
            shown.append(task_table(f"{task.name}: {chosen.seeds} seeds, rate {rate:g}", runs))
            figures[task.name] = {
                "rate": rate,
                "summary": summary(runs),
                "selection": [result.to_dict() for result in selection],
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
