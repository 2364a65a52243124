"""How long does a blueprint take to become a kernel, verification included?"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from benchmarks import compare, harness, machine
from benchmarks.promises import Promise
from esper.blueprints import CATALOGUE
from esper.blueprints.representative import HIDDEN, describe, representative
from esper.blueprints.sizes import example_shapes
from esper.contracts import Signature
from esper.errors import EsperError
from esper.tezzeret.build import KernelRequest, build, pipeline, revive, warm

NAME = "compile"
REPEATS = 3  # every kernel so often, each time with other initial weights
ARMS = ("eager", "torchscript", "export", "inductor", "aoti")
USUAL = ("eager", "torchscript", "export")  # the others take seconds a kernel: ask for them by --arms
COLD = """
import time
start = time.perf_counter()
from benchmarks import compile
imported = time.perf_counter()
took = compile.measure(compile.first({arm!r}))
print(imported - start, took.wall / 1e3)
"""


@dataclass(frozen=True)
class Job:
    """One kernel to build."""

    blueprint: str
    place: Signature
    arm: str
    seed: int


def first(arm: str) -> Job:
    """Return the job a fresh process is measured on."""
    return Job("residual_mlp", representative(CATALOGUE.get("residual_mlp"))[0], arm, 0)


@dataclass(frozen=True)
class Built:
    """What it took, in milliseconds; the error instead, if it failed."""

    blueprint: str
    place: str
    arm: str
    seed: int
    cpu: float | None = None  # of this process, from request to kernel
    wall: float | None = None
    compiling: float | None = None  # of the wall's
    verifying: float | None = None  # of the wall's
    reviving: float | None = None  # from kernel to program, weights and form
    stored: int | None = None  # bytes of the compiled form
    error: str | None = None


def main(argv: Sequence[str]) -> int:
    """Build the whole catalogue at its representative places, warm; then one kernel in fresh processes.

    Judged is CPU time, which is wall time on a free core; both are shown. What a pipeline's own child
    processes use (a C++ compiler) is in the wall time only.
    """
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS, arms=ARMS)
    torch.set_num_threads(machine.THREADS_PER_WORKER)
    arms = [arm for arm in ARMS if arm in (chosen.arms or USUAL)]
    usable = [arm for arm in arms if pipeline(arm).unavailable() is None]
    start = time.perf_counter()
    warm()
    warming = time.perf_counter() - start
    built = [measure(job) for job in jobs(usable, chosen.seeds, chosen.quick)]
    cold = {} if chosen.quick else {arm: fresh(arm, chosen.seeds) for arm in usable}
    shown = [pipelines_table(built, usable), blueprints_table(built, usable), cold_table(cold, warming)]
    figures = {
        "unavailable": {arm: pipeline(arm).unavailable() for arm in arms if arm not in usable},
        "summary": {arm: summary([one for one in built if one.arm == arm]) for arm in usable},
        "warming_seconds": warming,
        "cold": cold,
        "runs": [vars(one) for one in built],
    }
    return harness.conclude(NAME, chosen, shown, promises(built, usable), figures)


def jobs(arms: Sequence[str], seeds: int, quick: bool) -> list[Job]:
    """List every kernel; the pipelines take turns."""
    return [
        Job(name, place, arm, seed)
        for seed in range(seeds)
        for name in (CATALOGUE.names()[:2] if quick else CATALOGUE.names())
        for place in representative(CATALOGUE.get(name))[: 1 if quick else None]
        for arm in arms
    ]


def measure(job: Job) -> Built:
    """Build one kernel and revive it."""
    shape = example_shapes(job.place)[0][0]
    graph = CATALOGUE.get(job.blueprint).to_json()
    request = KernelRequest(graph, job.place, HIDDEN, job.seed, shape, job.arm)
    names = (job.blueprint, describe(job.place), job.arm, job.seed)
    try:
        start, cpu = time.perf_counter(), time.process_time()
        kernel = build(request)
        made, cpu = time.perf_counter(), time.process_time() - cpu
        revive(kernel)
        revived = time.perf_counter()
    except EsperError as error:
        return Built(*names, error=f"{type(error).__name__}: {error}")
    return Built(
        *names,
        cpu=cpu * 1e3,
        wall=(made - start) * 1e3,
        compiling=kernel.report["compile_milliseconds"],
        verifying=kernel.report["verified"]["milliseconds"],
        reviving=(revived - made) * 1e3,
        stored=sum(map(len, kernel.variants.values())),
    )


def fresh(arm: str, repeats: int) -> dict[str, list[float]]:
    """Build one kernel in fresh processes; return wall seconds of all imports, and of the build."""
    times = []
    for _ in range(repeats):
        line = [sys.executable, "-c", COLD.format(arm=arm)]
        ran = subprocess.run(line, capture_output=True, text=True, check=True)
        times.append([float(part) for part in ran.stdout.split()])
    return {"imports": [one for one, _ in times], "build": [one for _, one in times]}


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of the values do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def summary(built: Sequence[Built]) -> dict[str, float | int | None]:
    """Condense one pipeline's builds."""
    good = [one for one in built if one.error is None]
    whole = [one.cpu for one in good if one.cpu is not None]
    record: dict[str, float | int | None] = {"builds": len(built), "failures": len(built) - len(good)}
    record |= {
        "p50": percentile(whole, 0.5) if whole else None,
        "p99": percentile(whole, 0.99) if whole else None,
        "worst": max(whole, default=None),
    }
    for part in ("wall", "compiling", "verifying", "reviving", "stored"):
        values = [getattr(one, part) for one in good]
        record[part] = statistics.median(values) if values else None
    return record


def promises(built: Sequence[Built], arms: Sequence[str]) -> list[Promise]:
    found = {arm: summary([one for one in built if one.arm == arm]) for arm in arms}
    failures = [one for one in built if one.error is not None]
    script, export = found.get("torchscript", {}), found.get("export", {})
    return [
        Promise("TorchScript kernel, warm: CPU ms, p50", script.get("p50"), "<=", 50, digits=1),
        Promise("TorchScript kernel, warm: CPU ms, p99", script.get("p99"), "<=", 150, digits=1),
        Promise("export kernel, warm: CPU ms, p50", export.get("p50"), "<=", 100, digits=1),
        Promise(f"failures of {len(built)} builds", len(failures), "<=", 0, digits=0),
    ]


def pipelines_table(built: Sequence[Built], arms: Sequence[str]) -> Table:
    parts = ("builds", "failures", "p50", "p99", "worst")
    more = ("wall", "compiling", "verifying", "reviving", "stored")
    heads = (*parts, "wall ms, p50", "of it compiling", "verifying", "reviving, p50", "stored bytes, p50")
    table = compare.titled("A kernel, warm: CPU ms from request to verified kernel", ["pipeline", *heads])
    for arm in arms:
        found = summary([one for one in built if one.arm == arm])
        table.add_row(arm, *(number(found[part], part) for part in (*parts, *more)))
    return table


def number(value: float | None, part: str) -> str:
    return "–" if value is None else f"{value:.{0 if part in ('builds', 'failures', 'stored') else 1}f}"


def blueprints_table(built: Sequence[Built], arms: Sequence[str]) -> Table:
    table = compare.titled("Each blueprint: CPU ms, p50 over its places", ["blueprint", "places", *arms])
    for name in dict.fromkeys(one.blueprint for one in built):
        mine = [one for one in built if one.blueprint == name]
        cells = [number(summary([one for one in mine if one.arm == arm])["p50"], "p50") for arm in arms]
        table.add_row(name, str(len({one.place for one in mine})), *cells)
    return table


def cold_table(cold: dict[str, dict[str, list[float]]], warming: float) -> Table:
    title = f"The first kernel of a fresh process, median wall seconds; warming this one took {warming:.2f} s"
    table = compare.titled(title, ["pipeline", "imports, torch's too", "first kernel"])
    for arm, times in cold.items():
        table.add_row(arm, *(f"{statistics.median(times[part]):.2f}" for part in ("imports", "build")))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
