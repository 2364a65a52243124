"""What does one step of all seeds cost: parallel tensors against a list of objects?"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import compare, harness
from benchmarks.promises import Promise
from esper.kasmina.seeds.state import VITALS, KasminaStateLayout

NAME = "state-layout"
REPEATS = 7  # rounds; in each, all arms are measured in turns
SIZES = (4, 64, 1000, 10_000)
PROMISED = 1000
SMOOTHING = 0.1
RAMP = 1e-4  # of alpha, per step
ARMS = ("parallel tensors", "objects", "objects of 0-dim tensors")
Row = tuple[float, float, float, float]  # one seed's new vitals


@dataclass(slots=True)
class Seed:
    """A seed as plain Python would hold it."""

    alpha: float = 0.0
    slope: float = RAMP
    variance: float = math.nan
    gradient: float = math.nan
    dead: float = math.nan
    latency: float = math.nan


@dataclass(slots=True)
class TensorSeed:
    """The same with a 0-dim tensor per field, the one mistake parallel tensors are there to avoid."""

    alpha: Tensor
    slope: Tensor
    vitals: list[Tensor]


def main(argv: Sequence[str]) -> int:
    """Time a step (alpha one step up its ramp, four vitals smoothed) for every size and arm."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS, arms=ARMS)
    torch.set_num_threads(1)
    sizes = SIZES[:2] if chosen.quick else SIZES
    rounds: dict[int, dict[str, list[float]]] = {size: {} for size in sizes}
    for size in sizes:
        steps = {arm: build(arm, size)[0] for arm in chosen.select(ARMS)}
        for _ in range(chosen.seeds):
            for arm, step in steps.items():
                rounds[size].setdefault(arm, []).append(microseconds(step))
    medians = {
        size: {arm: statistics.median(v) for arm, v in by_arm.items()} for size, by_arm in rounds.items()
    }
    title = f"µs per step, median of {chosen.seeds} rounds"
    table = compare.titled(title, ["seeds", *chosen.select(ARMS), "objects / parallel"])
    for size, by_arm in medians.items():
        ratio = speedup(by_arm)
        cells = [f"{value:.1f}" for value in by_arm.values()]
        table.add_row(str(size), *cells, "–" if ratio is None else f"{ratio:.1f}")
    text = f"{PROMISED} seeds: objects / parallel tensors"
    judged = [Promise(text, speedup(medians.get(PROMISED, {})), ">=", 20.0, digits=1)]
    return harness.conclude(NAME, chosen, [table], judged, {"microseconds": rounds, "medians": medians})


def speedup(medians: dict[str, float]) -> float | None:
    """Say how many times cheaper than objects the parallel tensors are, where both were measured."""
    if not {"objects", "parallel tensors"} <= medians.keys():
        return None
    return medians["objects"] / medians["parallel tensors"]


def microseconds(step: Callable[[], None], budget: float = 0.1) -> float:
    """Return what a call costs: the median of as many as fit into ``budget`` seconds, three at least."""
    step()
    taken: list[int] = []
    end = time.perf_counter_ns() + int(budget * 1e9)
    while len(taken) < 3 or time.perf_counter_ns() < end:
        start = time.perf_counter_ns()
        step()
        taken.append(time.perf_counter_ns() - start)
    return statistics.median(taken) / 1e3


def build(arm: str, size: int) -> tuple[Callable[[], None], Callable[[], list[list[float]]]]:
    """Return one arm's step and a reader of its rows: alpha, then the vitals.

    Every arm gets the samples in the form it likes best, and a first sample stands as it is in each.
    """
    samples = torch.rand(len(VITALS), size, generator=torch.Generator().manual_seed(0))
    rows: list[Row] = [(a, b, c, d) for a, b, c, d in samples.T.tolist()]
    if arm == "parallel tensors":
        return parallel(size, samples)
    if arm == "objects":
        seeds = [Seed() for _ in range(size)]
        return (lambda: step_objects(seeds, rows)), (
            lambda: [[s.alpha, s.variance, s.gradient, s.dead, s.latency] for s in seeds]
        )
    tensors = [
        TensorSeed(torch.tensor(0.0), torch.tensor(RAMP), [torch.tensor(math.nan) for _ in VITALS])
        for _ in rows
    ]
    given = [list(column.unbind()) for column in samples.T]
    return (lambda: step_tensors(tensors, given)), (
        lambda: [[float(s.alpha), *(float(v) for v in s.vitals)] for s in tensors]
    )


def parallel(size: int, samples: Tensor) -> tuple[Callable[[], None], Callable[[], list[list[float]]]]:
    layout = KasminaStateLayout(size, SMOOTHING)
    for seed in range(size):
        layout.ramp(seed, round(1 / RAMP))

    def step() -> None:
        layout.tick()
        layout.observe(samples)

    return step, lambda: torch.cat([layout.alpha[None], layout.vitals]).T.tolist()


def step_objects(seeds: Sequence[Seed], rows: Sequence[Row]) -> None:
    for seed, (variance, gradient, dead, latency) in zip(seeds, rows, strict=True):
        alpha = seed.alpha + seed.slope
        seed.alpha = 0.0 if alpha < 0 else min(alpha, 1.0)
        seed.variance = smoothed(seed.variance, variance)
        seed.gradient = smoothed(seed.gradient, gradient)
        seed.dead = smoothed(seed.dead, dead)
        seed.latency = smoothed(seed.latency, latency)


def smoothed(old: float, new: float) -> float:
    if new != new:  # NaN: not measured now
        return old
    return new if old != old else old + SMOOTHING * (new - old)


def step_tensors(seeds: Sequence[TensorSeed], rows: Sequence[list[Tensor]]) -> None:
    for seed, row in zip(seeds, rows, strict=True):
        seed.alpha.add_(seed.slope).clamp_(0, 1)
        for old, new in zip(seed.vitals, row, strict=True):
            first = torch.where(old.isnan(), new, old)
            old.copy_(first.add_((new - first).nan_to_num_(0.0), alpha=SMOOTHING))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
