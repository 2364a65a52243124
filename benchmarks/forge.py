"""What does a kernel built in the background cost the training, and does a hostile one stay contained?"""

from __future__ import annotations

import statistics
import sys
import time as clock
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks import compare, harness, hostile
from benchmarks.hostile import HOSTILE, LIMITS, REQUEST, Hostile
from benchmarks.promises import Promise
from esper.errors import EsperError
from esper.tezzeret import build as building
from esper.tezzeret.forge import Forge

NAME = "forge"
REPEATS = 5  # forges, each with its own worker
SUBMISSIONS, KERNELS = 200, 20  # for each
WAIT = 120.0  # seconds for anything


def main(argv: Sequence[str]) -> int:
    """Time submissions while a worker compiles, time to kernel, and hostile requests that are contained."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    submissions, kernels = (20, 3) if chosen.quick else (SUBMISSIONS, KERNELS)
    submit: list[float] = []
    cold: list[float] = []
    warm: list[float] = []
    for repeat in range(chosen.seeds):
        times = forge_kernels(repeat, submissions, kernels)
        submit += times["submit"]
        cold += times["cold"]
        warm += times["warm"]
    told = {what: contained(what) for what in (list(HOSTILE)[:2] if chosen.quick else HOSTILE)}

    table = compare.titled(f"Milliseconds, {chosen.seeds} workers", ["", "p50", "p99", "most", "count"])
    for name, values in (
        ("submit, while a worker compiles", submit),
        ("first kernel of a new forge", cold),
        ("kernel on a warm worker, one at a time", warm),
    ):
        figures = (statistics.median(values), percentile(values, 99), max(values))
        table.add_row(name, *(f"{value * 1e3:.3f}" for value in figures), str(len(values)))
    containment = compare.titled("Hostile requests", ["request", "seconds", "told", "next one works"])
    for what, found in told.items():
        containment.add_row(what, f"{found['seconds']:.2f}", str(found["error"]), str(found["next"]))
    judged = [
        Promise("submit: p99, ms, while a worker compiles", percentile(submit, 99) * 1e3, "<=", 2.0),
        Promise(
            "hostile requests not contained",
            sum(found["error"] is None or not found["next"] for found in told.values()),
            "<=",
            0,
            digits=0,
        ),
    ]
    figures = {"submit": submit, "cold": cold, "warm": warm, "hostile": told}
    return harness.conclude(NAME, chosen, [table, containment], judged, figures)


def forge_kernels(repeat: int, submissions: int, kernels: int) -> dict[str, list[float]]:
    """Submit what nobody asked before to one new forge; return seconds."""
    times: dict[str, list[float]] = {"submit": [], "cold": [], "warm": []}
    with Forge() as forge:
        start = clock.perf_counter()
        forge.submit(replace(REQUEST, seed=repeat)).result(WAIT)
        times["cold"].append(clock.perf_counter() - start)
        for seed in range(1, kernels + 1):
            start = clock.perf_counter()
            forge.submit(replace(REQUEST, seed=1000 + seed)).result(WAIT)
            times["warm"].append(clock.perf_counter() - start)
        for seed in range(submissions):
            start = clock.perf_counter()
            forge.submit(replace(REQUEST, seed=2000 + seed))
            times["submit"].append(clock.perf_counter() - start)
            clock.sleep(0.005)  # a training step: the worker gets on between two submissions
    return times


def contained(what: str) -> dict[str, Any]:
    """Forge a hostile request and then a good one."""
    with Forge(hostile.build, warm=building.warm, limits=LIMITS, retries=0) as forge:
        forge.submit(REQUEST).result(WAIT)
        start, error = clock.perf_counter(), None
        try:
            forge.submit(Hostile(what)).result(WAIT)
        except EsperError as told:
            error = f"{type(told).__name__}: {str(told).splitlines()[0][:60]}"
        seconds = clock.perf_counter() - start
        following = forge.submit(replace(REQUEST, seed=1)).result(WAIT)
        return {"seconds": seconds, "error": error, "next": following.seed == 1}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the nearest-rank percentile."""
    return sorted(values)[-(-len(values) * percent // 100) - 1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
