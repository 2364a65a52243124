"""Does the governor see a fault in time, keep quiet while all is well, and cost next to nothing?"""

from __future__ import annotations

import random
import statistics
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import esper
from benchmarks import compare, detector_runs, harness
from benchmarks.detector_cost import HOSTS, cost
from benchmarks.detector_runs import (
    DRIFTS,
    FAULTS,
    SCENARIOS,
    batches,
    drift_batch,
    drift_gradients,
    spoil_batch,
    spoil_gradients,
)
from benchmarks.promises import Promise
from benchmarks.workers import workers
from esper.nissa.detectors.robust import Detectors
from esper.tolaria.governor import Finding, GovernorHooks, Reading, VitalsReader

NAME = "detectors"
STEPS, AFTER = 1500, 12  # of a healthy run; of a spoilt one behind its fault
SLOW = 400  # steps of one that drifts, behind its beginning
FIRST, LAST = 100, 700  # where faults are injected
IN_TIME = 3  # steps
DELAYS, LATE = (0, 1, 2, 3, 5, 8, 12), (12, 50, 100, 200, 400)
LEARNED, SEVERAL = 0.5, 16  # of its first loss a run must have, and examples a batch, to show wrong labels


@dataclass(frozen=True)
class Job:
    """A run; ``quick`` ones are short."""

    scenario: str
    seed: int
    fault: str | None = None
    quick: bool = False


@dataclass(frozen=True)
class Answer:
    """What was found in a run; alarms by step, and kind for kind."""

    scenario: str
    seed: int
    fault: str | None
    steps: int  # healthy ones, in which an alarm is false
    at: int | None  # step of the fault
    false: tuple[str, ...]
    delay: int | None  # steps from the fault to the first alarm
    inferred: int | None  # the same without the watch on the learning rate itself
    shows: bool  # whether the labels could be told from noise: see LEARNED and SEVERAL
    grown: int


def main(argv: Sequence[str]) -> int:
    """Train healthy and spoilt runs; count false alarms, delays and microseconds."""
    chosen = harness.options(NAME, __doc__, argv, seeds=4)
    names = list(SCENARIOS)[:: 5 if chosen.quick else 1]
    seeds = range(chosen.seeds)
    healthy = [Job(name, seed, None, chosen.quick) for name in names for seed in seeds]
    spoilt = [
        Job(name, seed, fault, chosen.quick)
        for name in names
        for seed in seeds
        for fault in (*FAULTS, *DRIFTS)
    ]
    with workers(chosen.jobs) as pool:
        answers = pool.map(run, [*healthy, *spoilt], "runs")
        costs = pool.one_at_a_time(cost, ["small"] if chosen.quick else list(HOSTS), "cost")
    shown = [alarm_table(answers), delay_table(answers), drift_table(answers), cost_table(costs)]
    figures = {
        "runs": [vars(answer) for answer in answers],
        "cost": costs,
        "recall": {kind: recall(found) for kind, found in groups(answers).items()},
    }
    return harness.conclude(NAME, chosen, shown, promises(answers, costs), figures)


def run(job: Job) -> Answer:
    """Train one run with its detectors, and a growing one with its whole governor."""
    scenario = SCENARIOS[job.scenario]
    split, steps = scenario.split(job.seed), 200 if job.quick else STEPS
    draw = random.Random(f"{job.scenario} {job.seed} {job.fault}")
    at = None if job.fault is None else draw.randrange(FIRST, steps if job.quick else LAST)
    torch.manual_seed(job.seed)
    net = scenario.net()
    optimizer = scenario.optimizer(net.parameters())
    schedule = scenario.schedule(optimizer, steps) if scenario.schedule else None
    # What a governed run reads of a step this small: one gradient tensor, see Reading.of.
    watcher, detectors, inferring = VitalsReader(net, {"": optimizer}), Detectors(), Detectors()
    watcher.reading = Reading(tensors=1)
    growth = grow(net, optimizer, scenario, split, steps, job.seed, detectors) if scenario.grows else None
    generator = torch.Generator().manual_seed(job.seed)
    stream, found, guessed = batches(split, scenario.batch, job.seed), [], []
    first: list[float] = []
    latest: list[float] = []
    behind = (AFTER if job.quick else SLOW) if job.fault in DRIFTS else AFTER
    last = steps if at is None else at + behind
    for step in range(1, last + 1):
        now, since, age = step == at, at is not None and step >= at, 0 if at is None else step - at
        x, y = batch = spoil_batch(job.fault, now, since, next(stream), split.train[1], generator)
        x, y = drift_batch(job.fault, age, (x, y))
        loss = scenario.loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        spoil_gradients(job.fault, now, net)
        drift_gradients(job.fault, age, net, generator)
        rates = [group["lr"] for group in optimizer.param_groups]
        if since and job.fault == "learning rate ×100":
            for group in optimizer.param_groups:
                group["lr"] *= 100
        if job.fault == "rate creeps up" and age > 0:
            for group in optimizer.param_groups:
                group["lr"] *= (1 + DRIFTS["rate creeps up"]) ** age
        optimizer.step()
        vitals = watcher.read(float(loss.detach()))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if schedule is not None:
            schedule.step()
        note(found, detectors.look(vitals, step))
        unrated = type(vitals)(vitals.loss, vitals.gradient, vitals.weights)
        note(guessed, inferring.look(unrated, step))
        if growth is not None and not since:
            growth.step(batch, loss.detach())
        if step <= 24:
            first.append(vitals.loss)
        elif not since:
            latest = [*latest[-23:], vitals.loss]
    healthy = last if at is None else at - 1
    return Answer(
        job.scenario,
        job.seed,
        job.fault,
        healthy,
        at,
        tuple(str(one) for one in found if one.step <= healthy),
        delay(found, at),
        delay(guessed, at),
        statistics.median(latest) < LEARNED * statistics.median(first) and scenario.batch >= SEVERAL,
        0 if growth is None else len(growth.plans),
    )


def grow(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    scenario: detector_runs.Scenario,
    split: Any,
    steps: int,
    seed: int,
    detectors: Detectors,
) -> Any:
    """Let a run grow; its grafts and widenings are announced as the governor would."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return scenario.loss(model(batch[0]), batch[1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        growth = esper.grow(
            net,
            optimizer,
            loss,
            probe=[split.probe],
            steps=steps,
            budget={"growth_factor": 4.0},
            growth="incubate",
            seed=seed,
        )
    watch = growth.run.orchestrator.guard = GovernorHooks(growth.run)
    watch.watcher.close()  # the bench reads by itself
    watch.governor.detector = detectors
    return growth


def note(found: list[Finding], one: Finding | None) -> None:
    if one is not None and not one.expected:
        found.append(one)


def delay(found: Sequence[Finding], at: int | None) -> int | None:
    """Return the steps from the fault to the first alarm."""
    return None if at is None else next((one.step - at for one in found if one.step >= at), None)


# -- what is shown -------------------------------------------------------------------------------------------


def groups(answers: Sequence[Answer]) -> dict[str, list[int | None]]:
    """Return the delays by what is promised."""
    found = {fault: [a.delay for a in answers if a.fault == fault] for fault in FAULTS}
    rate, labels = FAULTS[-1], "label noise"
    found[f"{rate}, from loss and gradient alone"] = [a.inferred for a in answers if a.fault == rate]
    found[f"{labels}, learned and ≥ {SEVERAL} examples"] = [
        a.delay for a in answers if a.fault == labels and a.shows
    ]
    return found


def recall(delays: Sequence[int | None], within: int = IN_TIME) -> float | None:
    """Return the share found in time."""
    return sum(d is not None and d <= within for d in delays) / len(delays) if delays else None


def false_alarms(answers: Sequence[Answer]) -> float:
    """Return false alarms per 1,000 healthy steps."""
    return 1000 * sum(len(a.false) for a in answers) / sum(a.steps for a in answers)


def promises(answers: Sequence[Answer], costs: Sequence[dict[str, Any]]) -> list[Promise]:
    """Judge false alarms, recall within three steps, and the cost of steps of ten milliseconds."""
    found = groups(answers)
    judged = [
        Promise("false alarms per 1,000 healthy steps", false_alarms(answers), "<=", 0.1),
        Promise("healthy steps watched", sum(a.steps for a in answers), ">=", 50_000, digits=0),
    ]
    judged += [
        Promise(f"{fault}: found within {IN_TIME} steps", recall(found[fault]), ">=", 0.95, digits=3)
        for fault in (*FAULTS, f"label noise, learned and ≥ {SEVERAL} examples")
    ]
    large = [one["share"] for one in costs if one["step_ms"] >= 10]
    judged.append(Promise("cost of a step of 10 ms or more", max(large, default=None), "<=", 0.005))
    return judged


def alarm_table(answers: Sequence[Answer]) -> Any:
    shown = compare.titled("False alarms", ["runs", "healthy steps", "growths", "false", "per 1,000"])
    for name in dict.fromkeys(a.scenario for a in answers):
        mine = [a for a in answers if a.scenario == name]
        steps, false = sum(a.steps for a in mine), sum(len(a.false) for a in mine)
        grown = sum(a.grown for a in mine)
        shown.add_row(name, str(steps), str(grown), str(false), f"{1000 * false / steps:.3f}")
    return shown


def delay_table(answers: Sequence[Answer]) -> Any:
    shown = compare.titled("Share of faults found within so many steps", ["fault", "runs", *map(str, DELAYS)])
    for name, delays in groups(answers).items():
        shares = [recall(delays, within) for within in DELAYS]
        shown.add_row(name, str(len(delays)), *("–" if share is None else f"{share:.2f}" for share in shares))
    return shown


def drift_table(answers: Sequence[Answer]) -> Any:
    shown = compare.titled(
        "Slow drifts, reported and not promised: found within", ["drift", "runs", *map(str, LATE)]
    )
    for name in DRIFTS:
        delays = [a.delay for a in answers if a.fault == name]
        shown.add_row(name, str(len(delays)), *(f"{recall(delays, within) or 0.0:.2f}" for within in LATE))
    return shown


def cost_table(costs: Sequence[dict[str, Any]]) -> Any:
    shown = compare.titled(
        "Cost, CPU time of one thread",
        ["host", "parameters", "read every", "share read", "step ms", "governor ms", "share"],
    )
    for one in costs:
        facts = f"{one['parameters']}", f"{one['every']}", f"{one['share_read']:.2f}"
        times = f"{one['step_ms']:.2f}", f"{one['own_ms']:.3f}", f"{one['share']:.2%}"
        shown.add_row(one["host"], *facts, *times)
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
