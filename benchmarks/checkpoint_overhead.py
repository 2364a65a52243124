"""What do checkpoints cost a training run: at the default cadence, and each by itself?"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import esper
from benchmarks import compare, harness
from benchmarks.intervals import paired_difference
from benchmarks.promises import Promise
from esper.checkpoint import CheckpointManager, Run

NAME = "checkpoint-overhead"
SHARE = 0.015  # what was promised
PAIRS, QUICK_PAIRS = 30, 3  # of blocks with and without, at a forced cadence
BLOCK = 0.5  # seconds, at least
INTERVALS, MOST = 4, 120.0  # of the default cadence that are run through, and the seconds that takes at most
CLASSES = 10
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Host:
    """What is trained."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of a batch


HOSTS = (
    Host(
        "MLP",
        lambda: nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, CLASSES)),
        (512, 128),
    ),
    Host(
        "CNN",
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
            *(nn.Flatten(), nn.Linear(16, CLASSES)),
        ),
        (16, 3, 32, 32),
    ),
    Host(
        "MLP of 10 M",
        lambda: nn.Sequential(
            *(nn.Linear(256, 2900), nn.ReLU(), nn.Linear(2900, 2900), nn.ReLU(), nn.Linear(2900, CLASSES)),
        ),
        (64, 256),
    ),
)


def main(argv: Sequence[str]) -> int:
    """Train two copies of a host by turns, one with checkpoints; compare wall and CPU time by blocks.

    First at the default cadence, whose clock stands still while the other copy has its turn. Then, because
    what that costs drowns in the noise, at a cadence so short that it shows: the difference over the number
    of checkpoints is what one costs, and that over the default interval is the share of a run.
    """
    chosen = harness.options(NAME, __doc__, argv, seeds=1)
    torch.set_num_threads(1)
    found = {host.name: measured(host, chosen.quick) for host in (HOSTS[:1] if chosen.quick else HOSTS)}
    first = compare.titled(
        "At the default cadence: time with checkpoints over time without, and what is expected of it",
        ["host", "parameters", "ms a step", "seconds", "checkpoints", "wall [95 %]", "CPU [95 %]", "told"],
    )
    second = compare.titled(
        "At a forced cadence: milliseconds one checkpoint costs, over what the cadence reckons with",
        [
            "host",
            "ms apart",
            "checkpoints",
            "wall [95 %]",
            "CPU [95 %]",
            "reckoned",
            "share of a run, wall",
            "CPU",
        ],
    )
    third = compare.titled("Training stands still, in steps", ["host", "median", "worst", "ms, median"])
    for name, one in found.items():
        usual, forced = one["default"], one["forced"]
        figures = [
            f"{one['parameters']:,}",
            f"{one['step'] * 1e3:.1f}",
            f"{usual['seconds']:.0f}",
            str(usual["written"]),
        ]
        first.add_row(name, *figures, *(shown(usual[clock], 1.0) for clock in CLOCKS), one["told"])
        shares = [f"{forced[clock][0] / one['interval']:.3%}" for clock in CLOCKS]
        costs = [shown(forced[clock], 1e3) for clock in CLOCKS]
        second.add_row(
            name,
            f"{forced['apart'] * 1e3:.0f}",
            str(forced["written"]),
            *costs,
            f"{one['cost'] * 1e3:.2f}",
            *shares,
        )
        stalls = one["stalls"]
        third.add_row(name, f"{stalls[0]:.2f}", f"{stalls[1]:.2f}", f"{stalls[0] * one['step'] * 1e3:.2f}")
    judged = [
        *(
            Promise(
                f"{name}: share of a run's {clock} time, upper end",
                one["forced"][clock][2] / one["interval"],
                "<=",
                SHARE,
            )
            for name, one in found.items()
            for clock in CLOCKS
        ),
        *(
            Promise(
                f"{name}: with checkpoints over without, CPU, lower end",
                one["default"]["CPU"][1],
                "<=",
                1 + SHARE,
            )
            for name, one in found.items()
        ),
        *(
            Promise(f"{name}: training stands still, steps", one["stalls"][0], "<=", 1.0)
            for name, one in found.items()
        ),
    ]
    return harness.conclude(NAME, chosen, [first, second, third], judged, {"hosts": found})


CLOCKS = {"wall": time.perf_counter, "CPU": time.process_time}  # the second one's of all threads


def shown(interval: Sequence[float], scale: float) -> str:
    middle, low, high = (value * scale for value in interval)
    return f"{middle:.4g} [{low:.4g}, {high:.4g}]"


# -- the measurement -----------------------------------------------------------------------------------------


class Turns:
    """A clock that runs only while a copy has its turn."""

    def __init__(self) -> None:
        self.spent, self.begun = 0.0, math.nan

    def __call__(self) -> float:
        return self.spent + (0.0 if math.isnan(self.begun) else time.perf_counter() - self.begun)

    def begin(self) -> None:
        self.begun = time.perf_counter()

    def end(self) -> None:
        self.spent, self.begun = self(), math.nan


class Copy:
    """One copy of a host in training, with growth that only waits; with a storage it keeps checkpoints."""

    def __init__(self, host: Host, folder: str | None = None) -> None:
        torch.manual_seed(0)
        self.net = host.build()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-4)
        self.batch = torch.randn(host.shape), torch.randint(CLASSES, host.shape[:1])
        waiting = {"schedule": {"warmup": 0.9, "plateau": False}}
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            probe=[self.batch],
            steps=10**6,
            growth="incubate",
            config=waiting,
        )
        self.clock = Turns()
        self.manager: CheckpointManager | None = None
        if folder is not None:
            self.manager = CheckpointManager(folder, Run(self.net, self.optimizer, growth=self.growth))
            cadence = self.manager.cadence
            cadence.clock, cadence.begun, cadence.last = self.clock, 0.0, 0.0

    def block(self, steps: int) -> tuple[float, float]:
        """Train; return wall and CPU seconds, until the last checkpoint is written."""
        begun = [clock() for clock in CLOCKS.values()]
        self.clock.begin()
        for _ in range(steps):
            loss = loss_fn(self.net, self.batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.growth.step(self.batch, loss)
            if self.manager is not None:
                self.manager.step()
        if self.manager is not None:
            self.manager.writer.flush()
        self.clock.end()
        wall, cpu = (clock() - before for clock, before in zip(CLOCKS.values(), begun, strict=True))
        return wall, cpu


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def measured(host: Host, quick: bool) -> dict[str, Any]:
    """Measure one host."""
    with tempfile.TemporaryDirectory(prefix="esper-overhead-") as folder:
        bare, saving = Copy(host), Copy(host, folder)
        manager = saving.manager
        assert manager is not None
        bare.block(3), saving.block(3)
        for _ in range(3):
            begun = time.perf_counter()
            manager.save(wait=True)
            writing = time.perf_counter() - begun
        step = statistics.median(bare.block(1)[0] for _ in range(9))
        manager.stalls.clear()
        forced = at_forced(bare, saving, writing, step, QUICK_PAIRS if quick else PAIRS)
        stalls = [stall / step for stall in manager.stalls]
        cost, interval, told = manager.cadence.cost, manager.cadence.interval, ""
        manager.cadence.every = None
        cost, interval, told = manager.cadence.cost, manager.cadence.interval, manager.cadence.told()
        usual = at_default(bare, saving, step, 1.0 if quick else min(INTERVALS * interval, MOST))
        manager.close()
    return {
        "parameters": sum(p.numel() for p in bare.net.parameters()),
        "step": step,
        "cost": cost,
        "interval": interval,
        "told": told,
        "forced": forced,
        "default": usual,
        "stalls": [statistics.median(stalls), max(stalls)],
    }


def at_forced(bare: Copy, saving: Copy, writing: float, step: float, pairs: int) -> dict[str, Any]:
    """Save as soon as twice the time of writing has passed; return what one checkpoint costs."""
    manager = saving.manager
    assert manager is not None
    every = max(math.ceil(2 * writing / step), 2)
    count = max(round(BLOCK / (every * step)), 1)  # checkpoints in a block
    manager.cadence.every, manager.cadence.last_step = every, manager.steps
    before, taken = manager.written, paired(bare, saving, every * count, pairs)
    written = manager.written - before
    costs = {
        clock: ends([(b - a) * pairs / written for a, b in blocks])
        for clock, blocks in zip(CLOCKS, taken, strict=True)
    }
    return {"written": written, "apart": every * step, **costs}


def at_default(bare: Copy, saving: Copy, step: float, seconds: float) -> dict[str, Any]:
    """Train for some seconds; return the ratios of time with checkpoints over without."""
    manager = saving.manager
    assert manager is not None
    cadence = manager.cadence
    cadence.begun = cadence.last = saving.clock()
    cadence.spent = 0.0
    steps = max(round(BLOCK / step), 1)
    before, taken = manager.written, paired(bare, saving, steps, max(round(seconds / (steps * step)), 3))
    ratios = {clock: ends([b / a for a, b in blocks]) for clock, blocks in zip(CLOCKS, taken, strict=True)}
    return {"written": manager.written - before, "seconds": saving.clock() - cadence.begun, **ratios}


def paired(bare: Copy, saving: Copy, steps: int, pairs: int) -> tuple[list[tuple[float, float]], ...]:
    """Let both train by turns; return seconds without and with, of the wall's clock and of the CPU's."""
    wall, cpu = [], []
    for number in range(pairs):
        turns = (bare, saving) if number % 2 else (saving, bare)
        one = {id(copy): copy.block(steps) for copy in turns}
        (a, x), (b, y) = one[id(bare)], one[id(saving)]
        wall.append((a, b))
        cpu.append((x, y))
    return wall, cpu


def ends(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and the ends of its 95 % interval."""
    found = paired_difference(values, [0.0] * len(values))
    assert found.low is not None
    assert found.high is not None
    return found.mean, found.low, found.high


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
