"""What does the device tier answer at once, and how fast: hits, a trace of requests, a hundred at a time?"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from benchmarks import compare, harness
from benchmarks.promises import Promise
from esper.kasmina.seeds.cache import KernelCache, Key

NAME = "cache"
REPEATS = 3
KERNELS = 256
KERNEL_BYTES = 4096  # of weights each
# The published trace: kernels drawn by Zipf's law, P(rank r) proportional to 1/r**EXPONENT, seeds 0 to 2.
# Popular kernels come back while rare ones pass by, as in a run whose bandit has favourites.
REQUESTS = 20_000
EXPONENT = 1.1
CAPACITIES = (16, 32, 64, 128, 256)
JUDGED = 256  # kernels kept where the hit rate is judged: all of them, so that only first requests miss
ASKING = 50  # threads, and as many tasks


def main(argv: Sequence[str]) -> int:
    """Time hits one by one, replay the trace at every capacity, then ask from threads and tasks at once."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    requests = 2000 if chosen.quick else REQUESTS
    hits = {
        front: {str(p): float(np.percentile(taken, p)) for p in (50, 99)}
        for front, taken in hit_microseconds(requests).items()
    }
    rates = {
        capacity: [hit_rate(capacity, trace(seed, requests)) for seed in range(chosen.seeds)]
        for capacity in CAPACITIES
    }
    bounds = [most_popular_kept(capacity, requests) for capacity in CAPACITIES]
    loads = [loads_of_a_crowd() for _ in range(chosen.seeds)]

    speed = compare.titled(f"µs of a hit, {requests} of them", ["front", "p50", "p99"])
    for front, figures in hits.items():
        speed.add_row(front, *(f"{value:.2f}" for value in figures.values()))
    title = f"{requests} requests of {KERNELS} kernels, Zipf {EXPONENT}, seeds 0 to {chosen.seeds - 1}"
    replay = compare.titled(title, ["kernels kept", "hit rate", "least", "most", "most popular kept"])
    for (capacity, found), bound in zip(rates.items(), bounds, strict=True):
        figures = (statistics.mean(found), min(found), max(found), bound)
        replay.add_row(str(capacity), *(f"{value:.4f}" for value in figures))
    crowd = compare.titled(f"{ASKING} threads and {ASKING} tasks ask for one key at once", ["", "loads"])
    crowd.add_row(f"most of {chosen.seeds} times", str(max(loads)))

    judged = [
        Promise("a hit, blocking: µs, p50", hits["get"]["50"], "<=", 10.0, digits=2),
        Promise(f"hit rate of the trace, {JUDGED} kernels kept", min(rates[JUDGED]), ">=", 0.98),
        Promise(f"{2 * ASKING} at once: loads", float(max(loads)), "<=", 1.0, digits=0),
    ]
    figures = {
        "hit_microseconds": hits,
        "trace": {"kernels": KERNELS, "requests": requests, "law": "zipf", "exponent": EXPONENT},
        "hit_rates": rates,
        "most_popular_kept": dict(zip(CAPACITIES, bounds, strict=True)),
        "crowd_loads": loads,
    }
    return harness.conclude(NAME, chosen, [speed, replay, crowd], judged, figures)


def load(key: Key) -> Tensor:
    """Make what stands for a live kernel's weights."""
    return torch.zeros(KERNEL_BYTES // 4)


def hit_microseconds(requests: int) -> dict[str, list[float]]:
    """Time every hit of a full cache, through the blocking, the pinning and the asyncio front."""
    cache: KernelCache[Tensor] = KernelCache(load, KERNELS * KERNEL_BYTES)
    keys = [(f"{number:064x}", "cpu") for number in range(KERNELS)]
    for key in keys:
        cache.get(key)
    asked = [keys[number] for number in trace(0, requests)]
    taken: dict[str, list[float]] = {"get": [], "use": [], "aget": []}
    for key in asked:
        start = time.perf_counter_ns()
        cache.get(key)
        taken["get"].append((time.perf_counter_ns() - start) / 1e3)
    for key in asked:
        start = time.perf_counter_ns()
        with cache.use(key):
            pass
        taken["use"].append((time.perf_counter_ns() - start) / 1e3)

    async def awaiting() -> None:
        for key in asked:
            start = time.perf_counter_ns()
            await cache.aget(key)
            taken["aget"].append((time.perf_counter_ns() - start) / 1e3)

    asyncio.run(awaiting())
    assert cache.statistics().loads == KERNELS
    return taken


def law() -> np.ndarray:
    """Return every kernel's share of the requests."""
    weights = 1.0 / np.arange(1, KERNELS + 1) ** EXPONENT
    return weights / weights.sum()


def trace(seed: int, requests: int) -> list[int]:
    """Draw which kernels are asked for, in order."""
    return np.random.default_rng(seed).choice(KERNELS, requests, p=law()).tolist()


def hit_rate(capacity: int, asked: Sequence[int]) -> float:
    """Replay a trace through an empty cache of ``capacity`` kernels."""
    cache: KernelCache[Tensor] = KernelCache(load, capacity * KERNEL_BYTES)
    for number in asked:
        cache.get((str(number), "cpu"))
    found = cache.statistics()
    assert found.bytes <= capacity * KERNEL_BYTES
    assert found.hit_rate is not None
    return found.hit_rate


def most_popular_kept(capacity: int, requests: int) -> float:
    """Return the hit rate of a cache that knows the law and keeps the most popular, each loaded once."""
    shares = law()[:capacity]
    return float((shares - (1 - (1 - shares) ** requests) / requests).sum())


def loads_of_a_crowd() -> int:
    """Ask for one key from threads and tasks at once; return how many loads that caused."""
    crowd, gate = 2 * ASKING, threading.Event()

    def slow(key: Key) -> Tensor:
        gate.wait(30)  # until everybody has asked
        return load(key)

    cache: KernelCache[Tensor] = KernelCache(slow, KERNEL_BYTES)

    async def tasks() -> None:
        await asyncio.gather(*(cache.aget(("a", "cpu")) for _ in range(ASKING)))

    with ThreadPoolExecutor(ASKING + 1) as threads:
        asked = [threads.submit(cache.get, ("a", "cpu")) for _ in range(ASKING)]
        asked.append(threads.submit(asyncio.run, tasks()))
        end = time.monotonic() + 30
        while cache.statistics().misses < crowd and time.monotonic() < end:
            time.sleep(0.001)
        gate.set()
        for future in asked:
            future.result()
    return cache.statistics().loads


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
