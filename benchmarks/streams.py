"""Do streams of their own make parallel kernels faster? On CUDA only; elsewhere nothing is measured."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.text import Text
from torch import Tensor, nn

from benchmarks import compare, harness
from esper.kasmina.seeds.streams import StreamPool

NAME = "streams"
REPEATS = 7  # rounds; in each, both paths are measured in turns
STEPS = 50  # forward and backward passes per round
NOISE = 0.02  # a ratio closer to 1 than this is neither a gain nor a loss


@dataclass(frozen=True)
class Case:
    """A host layer and a kernel beside it, of the same size."""

    name: str
    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]


def convolution(batch: int, channels: int, side: int) -> Case:
    name = f"conv 3×3, {channels} channels, {side}×{side}, batch {batch}"
    return Case(name, lambda: nn.Conv2d(channels, channels, 3, padding=1), (batch, channels, side, side))


def linear(batch: int, width: int) -> Case:
    return Case(f"linear {width}→{width}, batch {batch}", lambda: nn.Linear(width, width), (batch, width))


CASES = (
    convolution(8, 16, 8),
    convolution(32, 32, 16),
    convolution(64, 64, 32),
    convolution(128, 128, 56),
    linear(32, 64),
    linear(256, 1024),
    linear(4096, 4096),
)


def main(argv: Sequence[str]) -> int:
    """Time forward and backward with and without streams; publish the verdict, gain or none."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    if not torch.cuda.is_available():
        said = Text("not measured: there is no CUDA device here, and on the CPU streams are a no-op")
        return harness.conclude(NAME, chosen, [said], [], {"device": None, "cases": None, "verdict": None})
    device = torch.cuda.get_device_name()
    cases = CASES[:1] if chosen.quick else CASES
    found = {case.name: measure(case, chosen.seeds) for case in cases}
    title = f"µs forward and backward on {device}, median of {chosen.seeds} rounds of {STEPS}"
    table = compare.titled(title, ["host layer and kernel, each", "in turns", "streams", "ratio", "verdict"])
    for name, rounds in found.items():
        alone, beside = statistics.median(rounds["in turns"]), statistics.median(rounds["streams"])
        figures = (f"{alone:.1f}", f"{beside:.1f}", f"{ratio(rounds):.3f}", verdict(ratio(rounds)))
        table.add_row(name, *figures)
    record = {
        name: {"microseconds": rounds, "ratio": ratio(rounds), "verdict": verdict(ratio(rounds))}
        for name, rounds in found.items()
    }
    overall = verdict(statistics.geometric_mean(ratio(rounds) for rounds in found.values()))
    said = Text(f"over all sizes: {overall}")
    figures = {"device": device, "cases": record, "verdict": overall}
    return harness.conclude(NAME, chosen, [table, said], [], figures)


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Return microseconds per pass of every round, by path."""
    torch.manual_seed(0)
    host, kernel = case.layer().cuda(), case.layer().cuda()
    x = torch.randn(case.shape, device="cuda")
    alpha = torch.tensor(0.5, device="cuda")
    paths = {"in turns": StreamPool(enabled=False), "streams": StreamPool()}
    taken: dict[str, list[float]] = {name: [] for name in paths}
    for pool in paths.values():
        timed(pool, host, kernel, x, alpha)  # once unmeasured: algorithms are chosen, memory is taken
    for _ in range(rounds):
        for name, pool in paths.items():
            taken[name].append(timed(pool, host, kernel, x, alpha))
    return taken


def timed(pool: StreamPool, host: nn.Module, kernel: nn.Module, x: Tensor, alpha: Tensor) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(STEPS):
        step(pool, host, kernel, x, alpha)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3 / STEPS


def step(pool: StreamPool, host: nn.Module, kernel: nn.Module, x: Tensor, alpha: Tensor) -> None:
    """Go forward and backward once, as a blend at a parallel port does."""
    side = pool.fork(x, kernel)
    y = host(x)
    torch.addcmul(y, alpha, side.join()).sum().backward()


def ratio(rounds: dict[str, list[float]]) -> float:
    """Return the median over rounds of streams to none; below 1 is a gain."""
    pairs = zip(rounds["streams"], rounds["in turns"], strict=True)
    return statistics.median(beside / alone for beside, alone in pairs)


def verdict(measured: float) -> str:
    if abs(measured - 1) < NOISE:
        return "none"
    return "gain" if measured < 1 else "loss"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
