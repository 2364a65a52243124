"""What does growing a large model cost in memory and in its worst step?

Hosts that have to grow: residual blocks whose insides are a fraction of what the task asks. Times are of the
process's own CPU on one core, so that neighbours on a shared machine do not count; memory is the peak of a
process, less what it held before the model was made.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from benchmarks import compare, harness
from benchmarks.promises import Promise

NAME = "size"
REPEATS = 1
INPUTS, OUTPUTS, HIDDEN, BATCH, HELD = 64, 16, 256, 128, 2
HOSTS = {  # stream, units in each block, the most the budget pays for, blocks, steps
    "10 wide places": (1536, 1024, 1536, 10, 40),
    "200 places, 1,000 modules": (320, 256, 352, 200, 36),
}
QUICK = {"10 wide places": (64, 48, 72, 4, 24), "200 places, 1,000 modules": (16, 8, 12, 20, 24)}
PLAIN = 8  # steps of plain training: memory and time of a step are known by then
MEMORY, WORST, GROWN = 1.3, 3.0, 1.3
ARMS = ("plain, start", "plain, final", "grown")
FIGURES = ("parameters", "modules", "peak", "median", "start", "worst", "growing")


def main(argv: Sequence[str]) -> int:
    """Grow each host, then train it plainly at its first and its last size, each in a process of its own."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    hosts = QUICK if chosen.quick else HOSTS
    figures = {name: compared(*size) for name, size in hosts.items()}
    heads = [
        "host",
        "arm",
        "parameters",
        "modules",
        "peak, MiB",
        "step, ms",
        "grow(), ms",
        "worst, ms",
        "all, s",
    ]
    table = compare.titled("Peak memory and steps", heads)
    promises = []
    for name, arms in figures.items():
        for arm, found in arms.items():
            table.add_row(name, arm, *(f"{found[key]:,.0f}" for key in FIGURES))
        first, last, grown = (arms[arm] for arm in ARMS)
        asked = (
            ("parameters, grown / at the start", grown["parameters"] / first["parameters"], ">=", GROWN),
            ("peak memory, growing / plain at the final size", grown["peak"] / last["peak"], "<=", MEMORY),
            ("worst growth.step, in training steps", grown["worst"] / grown["median"], "<=", WORST),
        )
        promises += [
            Promise(f"{name}: {what}", value, sign, bound, digits=2) for what, value, sign, bound in asked
        ]
    return harness.conclude(NAME, chosen, [table], promises, {"hosts": figures})


def compared(stream: int, units: int, most: int, blocks: int, steps: int) -> dict[str, dict[str, float]]:
    """Run the three arms of one host; the last plain one has about the parameters that were grown."""
    grown = measured("grown", stream, units, most, blocks, steps)
    full = round((grown["parameters"] - size_of(stream, 0, blocks)) / (blocks * (2 * stream + 1)))
    plain = [measured("plain", stream, width, 0, blocks, PLAIN) for width in (units, full)]
    return dict(zip(ARMS, [*plain, grown], strict=True))


def measured(arm: str, *numbers: int) -> dict[str, float]:
    """Run one arm in a process of its own: peak memory is a process's."""
    given = [sys.executable, "-m", "benchmarks.size", arm, *map(str, numbers)]
    ran = subprocess.run(given, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


class Block(nn.Module):
    """Adds to a stream what a hidden layer makes of it."""

    def __init__(self, stream: int, units: int) -> None:
        super().__init__()
        self.norm, self.act = nn.LayerNorm(stream), nn.ReLU()
        self.up, self.down = nn.Linear(stream, units), nn.Linear(units, stream)

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream."""
        return x + self.down(self.act(self.up(self.norm(x))))


def host(stream: int, units: int, blocks: int) -> nn.Sequential:
    torch.manual_seed(0)
    inside = [Block(stream, units) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(INPUTS, stream), *inside, nn.LayerNorm(stream), nn.Linear(stream, OUTPUTS))


def size_of(stream: int, units: int, blocks: int) -> int:
    """Count the parameters of a host."""
    rest = stream * (INPUTS + 1) + 2 * stream + OUTPUTS * (stream + 1)
    return rest + blocks * (units * (2 * stream + 1) + 3 * stream)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Draw inputs, and what a net with one wide layer makes of them."""
    teacher = torch.Generator().manual_seed(1)
    first = torch.randn(INPUTS, HIDDEN, generator=teacher) * 2 / INPUTS**0.5
    second = torch.randn(HIDDEN, OUTPUTS, generator=teacher) / HIDDEN**0.5
    x = torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(seed))
    return x, torch.relu(x @ first) @ second


def loss(model: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(given[0]), given[1])


def resident() -> float:
    """Return the most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(arm: str, stream: int, units: int, most: int, blocks: int, steps: int) -> dict[str, float]:
    """Train, and time every step; growth's own part of it besides."""
    torch.set_num_threads(1)
    batch(0)
    before = resident()
    net = host(stream, units, blocks)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    growth, begun = None, time.process_time()
    if arm == "grown":
        probe = [batch(10_000 + i) for i in range(HELD)]
        budget = {"parameters": size_of(stream, most, blocks)}
        growth = esper.grow(net, optimizer, loss, probe=probe, steps=steps, budget=budget)
    start = time.process_time() - begun
    times, own = list[float](), [0.0]
    for step in range(steps):
        given = batch(step)
        begun = time.process_time()
        value = loss(net, given)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        told = time.process_time()
        times.append(told - begun)
        if growth is not None:
            growth.step(given, value)
            own.append(time.process_time() - told)
    if growth is not None:
        growth.finish()
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "modules": sum(1 for _ in net.modules()),
        "peak": resident() - before,
        "median": sorted(times)[len(times) // 2] * 1e3,
        "start": start * 1e3,
        "worst": max(own) * 1e3,
        "growing": sum(own),
    }


if __name__ == "__main__":
    if sys.argv[1:2] in (["plain"], ["grown"]):
        print(json.dumps(train(sys.argv[1], *map(int, sys.argv[2:]))))
    else:
        sys.exit(main(sys.argv[1:]))
