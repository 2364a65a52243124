"""What does growing a large model cost in memory and in its worst step?"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import esper
from benchmarks import compare, harness
from benchmarks.promises import Promise

NAME = "size"
REPEATS = 1
INPUTS, CLASSES, BATCH = 512, 16, 128
HOSTS = {"45 M parameters": (2900, 4500, 3), "200 places": (48, 64, 200)}  # widths before and full, layers
QUICK = {"45 M parameters": (64, 96, 3), "200 places": (8, 12, 20)}
STEPS, QUICK_STEPS = 40, 24
MEMORY, WORST = 1.3, 3.0


def main(argv: Sequence[str]) -> int:
    """Train each host plainly at its full width, and grow it up to that, each in a process of its own."""
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    hosts, steps = (QUICK, QUICK_STEPS) if chosen.quick else (HOSTS, STEPS)
    figures = {
        name: {arm: measured(arm, *size, steps) for arm in ("plain", "grown")} for name, size in hosts.items()
    }
    table = compare.titled(
        "Peak memory and steps",
        [
            "host",
            "arm",
            "parameters",
            "peak RSS, MiB",
            "median step, ms",
            "worst step, ms",
            "worst event, ms",
        ],
    )
    promises = []
    for name, arms in figures.items():
        for arm, found in arms.items():
            table.add_row(
                name,
                arm,
                *(f"{found[key]:,.0f}" for key in ("parameters", "peak", "median", "worst", "event")),
            )
        plain, grown = arms["plain"], arms["grown"]
        promises += [
            Promise(
                f"{name}: peak memory, growing / plain training at full width",
                grown["peak"] / plain["peak"],
                "<=",
                MEMORY,
                digits=2,
            ),
            Promise(
                f"{name}: worst growth.step, in training steps at full width",
                grown["event"] / plain["median"],
                "<=",
                WORST,
                digits=2,
            ),
        ]
    return harness.conclude(NAME, chosen, [table], promises, {"hosts": figures})


def measured(arm: str, small: int, full: int, layers: int, steps: int) -> dict[str, float]:
    """Run one arm in a process of its own: peak memory is a process's."""
    given = [sys.executable, "-m", "benchmarks.size", arm, str(small), str(full), str(layers), str(steps)]
    ran = subprocess.run(given, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def mlp(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    hidden = [layer for _ in range(layers - 1) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), *hidden, nn.Linear(width, CLASSES))


def batch(seed: int, examples: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (examples,), generator=generator)
    return 2 * torch.eye(CLASSES, INPUTS)[y] + torch.randn(examples, INPUTS, generator=generator), y


def train(arm: str, small: int, full: int, layers: int, steps: int) -> dict[str, float]:
    """Train, and time every step; growth's own part of it besides."""
    torch.set_num_threads(1)
    net = mlp(full if arm == "plain" else small, layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    growth = None
    if arm == "grown":
        limit = sum(p.numel() for p in mlp(full, layers).parameters())
        probe = [batch(10_000 + i) for i in range(4)]
        growth = esper.grow(net, optimizer, loss, probe=probe, steps=steps, budget={"parameters": limit})
    times, own = [], [0.0]
    for step in range(steps):
        begun = time.perf_counter()
        given = batch(step)
        value = loss(net, given)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        told = time.perf_counter()
        if growth is not None:
            growth.step(given, value)
            own.append(time.perf_counter() - told)
        times.append(time.perf_counter() - begun)
    if growth is not None:
        growth.finish()
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "median": sorted(times)[len(times) // 2] * 1e3,
        "worst": max(times) * 1e3,
        "event": max(own) * 1e3,
    }


def loss(model: nn.Module, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(given[0]), given[1])


if __name__ == "__main__":
    if sys.argv[1:2] in (["plain"], ["grown"]):
        print(json.dumps(train(sys.argv[1], *map(int, sys.argv[2:]))))
    else:
        sys.exit(main(sys.argv[1:]))
