"""Is the gate's p-value honest about the mean? False-keep rates where nothing helps; power where growth does.

Every cell draws 10,000 probes a seed whose true mean gain is exactly nought. A cell is promised unless it
cannot hold: (1 - seen)^n of the probes of n examples show nothing of what is rare, and to such a probe the
loss that would undo the gain is unknown (Bahadur & Savage 1956: no test of the mean holds for every one);
or its neighbours are correlated over more examples than a block has, and the blocks were not given.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from rich.table import Table

from benchmarks import harness
from benchmarks.nulls import BOTH, NULLS, Null
from benchmarks.promises import Promise
from benchmarks.workers import Workers, workers
from esper.kasmina.evidence import significance
from esper.kasmina.evidence.significance import Spending

NAME = "evidence"
ALPHAS = (0.05, 0.01, 0.001, 0.0002)
SIZES = (32, 64, 128, 270, 512, 1024)
ROWS, QUICK_ROWS, AT_ONCE = 10_000, 500, 2_000  # probes of a cell and seed; computed at a time
SLACK, SIGMAS = 1.2, 3.0  # a rate of 1.2 budgets is kept; so many standard errors are Monte Carlo's
RUNS = ((4, 3), (5, 6), (12, 5))  # events and places: 12, 30 and 60 looks
BUDGET, PROBE = 0.05, 270  # of whole runs
RUN_NULLS = ("normal", "lognormal, rare losses", "exponential, rare losses", "t, 3 df", "8 identical rows")
POWER = ((64, 4.0), (128, 4.0), (270, 4.0), (270, 6.0), (512, 5.0), (1024, 4.0), (1024, 6.0), (1024, 10.0))


@dataclass(frozen=True)
class Job:
    """One cell: ``blocks`` are given, "own" where every value is the mean of a block of 16."""

    null: str
    n: int
    rows: int
    seed: int
    blocks: int | None = None
    means: bool = False
    run: tuple[int, int] | None = None  # events and places: a whole run is judged


@dataclass(frozen=True)
class Cell:
    """How often chance passed, as multiples of the budget (of whole runs: their one budget)."""

    null: str
    n: int
    note: str
    rates: tuple[float, ...]
    plain: tuple[float, ...]  # Student's t over single examples
    draws: int
    promised: tuple[bool, ...]
    alphas: tuple[float, ...]

    @property
    def missed(self) -> int:
        """Count the promised rates that exceed the slack by more than Monte Carlo's error."""
        rows = zip(self.rates, self.promised, self.alphas, strict=True)
        return sum(
            said and rate > SLACK + SIGMAS * math.sqrt(SLACK / a / self.draws) for rate, said, a in rows
        )


def known(name: str) -> Null:
    return {**NULLS, **BOTH}[name]


def count(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Count a seed's probes that chance lets pass, at every budget; the test's and plain Student's t."""
    rng = np.random.default_rng([job.seed, job.n, job.rows, sum(job.null.encode()), job.blocks or 0])
    found, plain = np.zeros(len(ALPHAS)), np.zeros(len(ALPHAS))
    for _ in range(0, job.rows, AT_ONCE):
        rows = min(job.rows, AT_ONCE)
        values = known(job.null).draw(rng, rows, job.n * (16 if job.means else 1))
        if job.means:
            values = values.reshape(rows, job.n, 16).mean(axis=2)
        found += passes(values, job.blocks, np.array(ALPHAS))
        plain += (significance.student(values)[:, None] <= np.array(ALPHAS)).sum(axis=0)
    return found, plain


def passes(values: np.ndarray, blocks: int | None, alphas: np.ndarray) -> np.ndarray:
    """Count passes; rows that Student's t over blocks stops already need no likelihood (it only adds)."""
    values = values[np.ptp(values, axis=1) > 0]
    cuts = significance.starts(values.shape[1], blocks)
    near = values[significance.student(significance.block_means(values, cuts)) <= alphas.max()]
    p = significance.p_values(near, blocks) if len(near) else np.ones(0)
    return (p[:, None] <= alphas).sum(axis=0)


def count_runs(job: Job) -> int:
    """Count whole runs that keep anything: every look at the threshold of its event."""
    assert job.run is not None
    rng = np.random.default_rng([job.seed, *job.run, sum(job.null.encode())])
    kept = np.zeros(job.rows, dtype=bool)
    spending = Spending(BUDGET)
    for event in range(job.run[0]):
        threshold = spending.threshold(event, job.run[1])
        for _ in range(job.run[1]):
            values = known(job.null).draw(rng, job.rows, job.n)
            t = significance.student(significance.block_means(values, significance.starts(job.n, None)))
            (near,) = np.nonzero(t <= threshold)
            if len(near):
                kept[near] |= significance.p_values(values[near]) <= threshold
    return int(kept.sum())


def jobs(rows: int, seeds: int, sizes: Sequence[int]) -> list[Job]:
    """List every cell of single looks."""
    listed = [Job(null, n, rows, seed) for null in (*NULLS, *BOTH) for n in sizes for seed in range(seeds)]
    for null, blocks in (("AR .5 in 32", 32), ("AR .9 in 32", 32)):
        listed += [Job(null, n, rows, seed, n // blocks) for n in sizes if n >= 512 for seed in range(seeds)]
    skewed = (
        "normal",
        "exponential, rare losses",
        "lognormal, rare losses",
        "N4: .07 lose .14",
        ".02 lose .5",
    )
    for null in skewed:
        listed += [Job(null, n, rows, s, n, True) for n in (8, 16, 32, 64) for s in range(seeds)]
    return listed


def cells(listed: Sequence[Job], counts: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Cell]:
    """Join the seeds of every cell."""
    joined: dict[Job, list[tuple[np.ndarray, np.ndarray]]] = {}
    for job, counted in zip(listed, counts, strict=True):
        joined.setdefault(Job(job.null, job.n, job.rows, 0, job.blocks, job.means), []).append(counted)
    found = []
    for job, parts in joined.items():
        draws = job.rows * len(parts)
        rates, plain = (sum(part[i] for part in parts) / draws / np.array(ALPHAS) for i in (0, 1))
        null, n = known(job.null), job.n * (16 if job.means else 1)
        fits = job.null in NULLS and (job.blocks is not None or null.fits(job.n))
        promised = tuple(fits and (1 - null.seen) ** n <= alpha for alpha in ALPHAS)
        note = "means of 16" if job.means else f"{job.blocks} blocks given" if job.blocks else ""
        found.append(Cell(job.null, job.n, note, tuple(rates), tuple(plain), draws, promised, ALPHAS))
    return found


def run_cells(pool: Workers, rows: int) -> list[Cell]:
    """Judge whole runs."""
    listed = [Job(null, PROBE, rows, 0, run=run) for null in RUN_NULLS for run in RUNS]
    kept = pool.map(count_runs, listed, "whole runs")
    return [
        Cell(
            j.null,
            j.n,
            f"{j.run[0]} events of {j.run[1]}",
            (k / rows / BUDGET,),
            (),
            rows,
            (True,),
            (BUDGET,),
        )
        for j, k in zip(listed, kept, strict=True)
        if j.run is not None
    ]


def power(rows: int) -> list[dict[str, object]]:
    """Measure how often a real gain passes, given the z that it has; plain t beside it."""
    rng, shown = np.random.default_rng(0), []
    for kind, draw in (
        ("normal", normal_unit),
        ("t, 3 df", lambda rng, rows, n: rng.standard_t(3, (rows, n)) / math.sqrt(3)),
        ("rare gains", lambda rng, rows, n: rng.exponential(size=(rows, n)) - 1),
    ):
        for n, z in POWER:
            values = draw(rng, rows, n) + z / math.sqrt(n)
            rate = (significance.p_values(values)[:, None] <= np.array(ALPHAS)).mean(axis=0)
            plain = (significance.student(values)[:, None] <= np.array(ALPHAS)).mean(axis=0)
            shown.append({"gains": kind, "n": n, "z": z, "passes": rate.tolist(), "plain t": plain.tolist()})
    return shown


def normal_unit(rng: np.random.Generator, rows: int, n: int) -> np.ndarray:
    return rng.normal(size=(rows, n))


def rate_table(found: Sequence[Cell]) -> Table:
    """Show every cell; what cannot be promised stands in brackets."""
    shown = Table(title="Chance passes, in multiples of the budget (plain t behind)", title_justify="left")
    for heading in ("gains", "n", "", *(f"{alpha:g}" for alpha in ALPHAS)):
        shown.add_column(heading, justify="left" if heading in ("gains", "") else "right")
    for cell in found:
        pairs = zip(cell.rates, cell.plain or [None] * len(cell.rates), cell.promised, strict=True)
        texts = [
            (f"{rate:.2f}" if said else f"({rate:.2f})") + ("" if plain is None else f" / {plain:.1f}")
            for rate, plain, said in pairs
        ]
        shown.add_row(cell.null, str(cell.n), cell.note, *texts)
    return shown


def power_table(rows: Sequence[dict[str, object]]) -> Table:
    """Show how often real gains pass."""
    shown = Table(title="Real gains pass (plain t behind)", title_justify="left")
    for heading in ("gains", "n", "z", *(f"{alpha:g}" for alpha in ALPHAS)):
        shown.add_column(heading, justify="left" if heading == "gains" else "right")
    for row in rows:
        pairs = zip(row["passes"], row["plain t"], strict=True)  # type: ignore[call-overload]
        texts = [f"{rate:.2f} / {plain:.2f}" for rate, plain in pairs]
        shown.add_row(str(row["gains"]), str(row["n"]), f"{row['z']:g}", *texts)
    return shown


def main(argv: Sequence[str]) -> int:
    """Draw nulls and real gains, judge them by the gate's p-value, compare with the promise."""
    chosen = harness.options(NAME, __doc__, argv, seeds=10)
    rows = QUICK_ROWS if chosen.quick else ROWS
    listed = jobs(rows, chosen.seeds, SIZES[:4] if chosen.quick else SIZES)
    with workers(chosen.jobs) as pool:
        found = cells(listed, pool.map(count, listed, "single looks"))
        found += run_cells(pool, 500 if chosen.quick else 10_000)
    gains = power(200 if chosen.quick else 2_000)
    strong = [row for row in gains if row["gains"] == "normal" and row["n"] == 1024 and row["z"] == 6.0]
    sizes = {str(a): [significance.smallest(a), significance.smallest(a, of_blocks=True)] for a in ALPHAS}
    promises = [
        Promise(
            "cells whose false-keep rate exceeds 1.2 budgets",
            float(sum(c.missed for c in found)),
            "<=",
            0.0,
            0,
        ),
        Promise("power at z = 6, n = 1,024, level 0.0002", strong[0]["passes"][-1], ">=", 0.9, 2),  # type: ignore[index]
    ]
    figures = {"cells": [asdict(cell) for cell in found], "power": gains, "fewest values": sizes}
    return harness.conclude(NAME, chosen, [rate_table(found), power_table(gains)], promises, figures)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
