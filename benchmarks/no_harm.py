"""Where growth cannot help, does it leave the network alone? Default settings, against a twin without."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from benchmarks import harness
from benchmarks.compare import titled
from benchmarks.intervals import mean_of, paired_difference
from benchmarks.promises import Promise
from benchmarks.suite_runs.training import Run, Training
from benchmarks.suite_tasks.no_harm import HOSTS
from benchmarks.workers import workers

NAME = "no-harm"
FIRST_SEED = 100  # Esper's defaults were chosen on seeds below
POINTS, SHARE = 0.005, 0.01  # the metric's mean may be lower by half a point, a loss higher by 1 %
QUICK_STEPS = 24
SHAPES = ("widened", "grafted", "deepened")
DEFAULTS = {"budget": None}  # not even a size is named


@dataclass(frozen=True)
class Job:
    host: str
    seed: int
    quick: bool


@dataclass(frozen=True)
class Pair:
    """A run with growth and its twin of the same data, order and start; ``equal``: bit for bit at the end."""

    grown: Run
    twin: Run
    equal: bool

    @property
    def larger(self) -> bool:
        return self.grown.parameters > self.twin.parameters

    @property
    def changed(self) -> bool:
        """Say whether the network had another shape at any time, taken back or not."""
        return self.larger or any(told["kind"] in SHAPES for told in self.grown.grew)

    def to_dict(self) -> dict[str, Any]:
        costs = ("parameters", "test", "test_loss", "flops", "seconds", "cpu_seconds")
        sides = {"grown": self.grown, "twin": self.twin}
        record: dict[str, Any] = {"seed": self.grown.seed, "equal": self.equal, "changed": self.changed}
        return record | {side: {name: getattr(run, name) for name in costs} for side, run in sides.items()}


def run(job: Job) -> Pair:
    """Train both twins, one after the other, from one network."""
    host = HOSTS[job.host]
    net = host.build(job.seed)
    steps = QUICK_STEPS if job.quick else None
    twins = [(copy.deepcopy(net), None), (net, DEFAULTS)]
    trained = [Training(host.task, n, job.seed, host.rate, grow=grow, steps=steps) for n, grow in twins]
    for training in trained:
        training.advance(training.steps)
    twin, grown = trained
    return Pair(grown.result(), twin.result(), same(grown.net, twin.net))


def same(a: nn.Module, b: nn.Module) -> bool:
    """Say whether two networks hold the same tensors under the same names, bit for bit."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def main(argv: Sequence[str]) -> int:
    """Train each host with growth and its twin without, on the same seeds; count what was kept."""
    chosen = harness.options(NAME, __doc__, argv, seeds=20, arms=tuple(HOSTS))
    names = chosen.select(tuple(HOSTS))
    seeds = range(FIRST_SEED, FIRST_SEED + chosen.seeds)
    with workers(chosen.jobs) as pool:
        pairs = {
            name: pool.map(run, [Job(name, seed, chosen.quick) for seed in seeds], name) for name in names
        }
    judged = [promise for name, found in pairs.items() for promise in promises(name, found)]
    figures = {
        "first_seed": FIRST_SEED,
        "rates": {name: HOSTS[name].rate for name in names},
        "runs": {name: [pair.to_dict() for pair in found] for name, found in pairs.items()},
    }
    return harness.conclude(NAME, chosen, [table(pairs)], judged, figures)


def gain(name: str, pairs: Sequence[Pair]) -> list[float]:
    """Say how much better each grown run is than its twin: accuracy, or shares of the twins' mean loss."""
    if HOSTS[name].task.metric == "accuracy":
        return [pair.grown.test - pair.twin.test for pair in pairs]
    scale = mean_of([pair.twin.test for pair in pairs]).mean
    return [(pair.twin.test - pair.grown.test) / scale for pair in pairs]


def promises(name: str, pairs: Sequence[Pair]) -> list[Promise]:
    """Judge runs that end larger, the final metric, and that a run left alone is its twin bit for bit."""
    bound = -POINTS if HOSTS[name].task.metric == "accuracy" else -SHARE
    most = max(1, math.floor(len(pairs) / 20))
    touched = sum(not pair.changed and not pair.equal for pair in pairs)
    return [
        Promise(f"{name}: runs of {len(pairs)} that end larger", sum(p.larger for p in pairs), "<=", most, 0),
        Promise(
            f"{name}: gain in {HOSTS[name].task.metric} over the twin",
            mean_of(gain(name, pairs)).mean,
            ">=",
            bound,
        ),
        Promise(f"{name}: runs that kept nothing yet differ from their twin", touched, "<=", 0, 0),
    ]


def table(pairs: dict[str, list[Pair]]) -> Table:
    heads = ("host", "runs", "larger", "taken back", "metric", "twin", "gain [95 %]", "FLOPs", "s", "CPU-s")
    shown = titled("Growth where it cannot help, against the twin without; costs as ratios", heads)
    for name, found in pairs.items():
        zeros = [0.0] * len(found)
        costs = [
            mean_of([getattr(p.grown, c) for p in found]).mean
            / mean_of([getattr(p.twin, c) for p in found]).mean
            for c in ("flops", "seconds", "cpu_seconds")
        ]
        shown.add_row(
            name,
            str(len(found)),
            str(sum(pair.larger for pair in found)),
            str(sum(pair.changed and not pair.larger for pair in found)),
            HOSTS[name].task.metric,
            mean_of([pair.twin.test for pair in found]).show(),
            paired_difference(gain(name, found), zeros).show(),
            *(f"{cost:.2f}" for cost in costs),
        )
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
