"""Does the choice of arms cost nothing, and lose less than the four classic bandits do?"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from benchmarks import compare, harness
from benchmarks.promises import Promise
from benchmarks.selection_worlds import CONTEXTUAL, DECISIONS, TRACES, draw, regret
from esper.tamiyo.controller import BANDITS

NAME = "selection"
WORLDS = 20  # of each trace
FIRST = 100  # seed of the first; the constants were set on 0 to 9
FOUR = ("ucb", "thompson", "epsilon_greedy", "performance")
OURS = ("contextual", "auto")
SIZES = (8, 64, 1000)  # arms
KNOWN = 11  # features, as Tamiyo gives
CALLS, QUICK_CALLS = 2000, 50
JUDGED, LIMIT = 64, 200.0  # arms, and µs at the 99th percentile
LESS, MORE = -0.30, 0.10  # regret against the best of the four


def main(argv: Sequence[str]) -> int:
    """Play every bandit through the same worlds, then time its choices; each trace has its best of four."""
    chosen = harness.options(NAME, __doc__, argv, seeds=WORLDS, arms=(*FOUR, *OURS))
    names = chosen.select((*FOUR, *OURS))
    lost = played(names, chosen.seeds, chosen.jobs, DECISIONS // 4 if chosen.quick else DECISIONS)
    times = {name: timed(name, QUICK_CALLS if chosen.quick else CALLS) for name in names}

    worlds = compare.titled(f"Regret per decision, mean of {chosen.seeds} worlds", ["bandit", *TRACES])
    for name in names:
        worlds.add_row(name, *(f"{statistics.mean(lost[name][trace]):.4f}" for trace in TRACES))
    if "auto" in names and set(FOUR) <= set(names):
        gains = against_the_best(lost)
        worlds.add_row("auto / best of four − 1", *(f"{gains[trace]:+.0%}" for trace in TRACES))
    else:
        gains = {}
    clock = compare.titled("µs of a choice, and of writing down what was learned", ["bandit", *columns()])
    for name, by_size in times.items():
        clock.add_row(name, *(f"{value:.0f}" for row in by_size.values() for value in row))
    judged = [
        Promise(f"{trace}: auto against the best of four", gains.get(trace), "<=", limit(trace), digits=2)
        for trace in TRACES
    ]
    judged += [
        Promise(f"{name}: p99 µs, {JUDGED} arms", times[name][JUDGED][1], "<=", LIMIT, digits=0)
        for name in OURS
        if name in times
    ]
    return harness.conclude(NAME, chosen, [worlds, clock], judged, {"regret": lost, "microseconds": times})


def limit(trace: str) -> float:
    """Say how much a trace allows against the best of four."""
    return LESS if trace in CONTEXTUAL else MORE


def columns() -> list[str]:
    return [f"{size} arms, {what}" for size in SIZES for what in ("median", "p99", "to JSON")]


def played(names: Sequence[str], worlds: int, jobs: int, decisions: int) -> dict[str, dict[str, list[float]]]:
    """Let every bandit play every world."""
    work = [(name, trace, FIRST + seed) for name in names for trace in TRACES for seed in range(worlds)]
    play = partial(one, decisions=decisions)
    if jobs:
        with ProcessPoolExecutor(jobs) as pool:
            results = list(pool.map(play, work, chunksize=8))
    else:
        results = [play(item) for item in work]
    lost: dict[str, dict[str, list[float]]] = {name: {trace: [] for trace in TRACES} for name in names}
    for (name, trace, _), value in zip(work, results, strict=True):
        lost[name][trace].append(value)
    return lost


def one(item: tuple[str, str, int], decisions: int) -> float:
    name, trace, seed = item
    return regret(BANDITS.get(name)(), draw(trace, seed, decisions), seed)


def against_the_best(lost: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, float]:
    """Return auto's regret over the least of the four's, less one, on every trace."""
    best = {trace: min(statistics.mean(lost[name][trace]) for name in FOUR) for trace in TRACES}
    return {trace: statistics.mean(lost["auto"][trace]) / best[trace] - 1 for trace in TRACES}


def timed(name: str, calls: int) -> dict[int, tuple[float, float, float]]:
    """Time choices among so many arms with features: µs at the median, at p99, and of writing the state down.

    It is the thread's own time: beside other work the 99th percentile of a clock on the wall is the
    scheduler's (12 ms).

    Lessons come between the choices, as in a run; what is written is what a checkpoint or a store gets.
    """
    taken = {}
    for size in SIZES:
        rng, bandit = np.random.default_rng(0), BANDITS.get(name)()
        arms = [("place", at) for at in range(size)]
        spent = []
        for _ in range(calls if size < SIZES[-1] else max(calls // 20, 10)):
            features = np.concatenate([np.full((size, 1), 0.5), rng.normal(size=(size, KNOWN - 1))], axis=1)
            start = time.thread_time_ns()
            index, _ = bandit.choose(arms, features, rng)
            spent.append(time.thread_time_ns() - start)
            bandit.learn(arms[index], features[index], float(rng.random()))
        start = time.perf_counter_ns()
        json.dumps(bandit.state_dict())
        written = (time.perf_counter_ns() - start) / 1e3
        taken[size] = (statistics.median(spent) / 1e3, float(np.percentile(spent, 99)) / 1e3, written)
    return taken


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
