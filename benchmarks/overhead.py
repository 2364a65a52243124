"""What does growth cost a training run: dormant, and a whole run split into its parts?"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from benchmarks import compare, data, harness
from benchmarks.promises import Promise
from esper.contracts import Event
from esper.nissa.run.journal import RunJournal
from esper.tolaria.growth import Growth

NAME = "overhead"
REPEATS = 1  # whole runs
STEPS, QUICK_STEPS = 3000, 60
BATCH, PROBE = 64, 256
WIDTH, NARROW = 14, 6  # channels: the narrowest host of this kind whose step takes 30 ms on one core here
DIGIT, COPIES = 20, 4  # side of a digit in its image; places each training digit is put at
ROUNDS, BURST = 60, {"MLP": 50, "CNN": 1}  # interleaved rounds of the dormant comparison, steps in each
PARTS = ("kernels", "incubation", "evidence", "survey", "surgery", "telemetry", "bookkeeping")
JUDGED = (("MLP", "wrapped"), ("CNN", "wrapped"), ("CNN", "growing, no decision yet"))
ARMS = ("bare", "bare again", "wrapped", "growing, no decision yet")  # the second shows the noise
CALLS, QUICK_CALLS, MOST = 3000, 300, 20.0  # timed calls of growth.step, and the microseconds one may take
Batch = tuple[Tensor, Tensor]


class Clock:
    """CPU time of this thread by part; time inside an inner part is not the outer one's."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)
        self.open: list[str] = []
        self.since = time.thread_time()

    def switch(self) -> None:
        now = time.thread_time()
        if self.open:
            self.parts[self.open[-1]] += now - self.since
        self.since = now

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self.open.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.switch()
                self.open.pop()

        return timed


def main(argv: Sequence[str]) -> int:
    """Compare a dormant host with a bare one, then run whole trainings; CPU time of the training thread.

    The whole run trains a CNN on real digits, enlarged and put somewhere into 3×32×32. The overhead is
    everything growth did plus what the host's own steps took longer while a seed was awake, over what they
    took without (medians of the dormant steps of the same size).
    """
    chosen = harness.options(NAME, __doc__, argv, seeds=REPEATS)
    torch.set_num_threads(1)
    dormant = {name: compared(name, 3 if chosen.quick else ROUNDS) for name in BURST}
    runs = [whole(seed, QUICK_STEPS if chosen.quick else STEPS) for seed in range(chosen.seeds)]

    first = compare.titled(
        "CPU time of a step against the bare host's, median of pairs [quartiles]",
        ["host", "bare, ms", *(k for k in dormant["CNN"] if k != "bare")],
    )
    for name, arms in dormant.items():
        ratios = [show(against(arms, arm)) for arm in arms if arm != "bare"]
        first.add_row(name, f"{statistics.median(arms['bare']) * 1e3:.3f}", *ratios)
    second = compare.titled(
        "A growing run: CPU seconds, and their share of the host's own",
        ["seed", "steps", "ms a step", "host", *PARTS, "overhead", "grown"],
    )
    for seed, one in enumerate(runs):
        cells = [f"{one['parts'][part]:.2f} ({one['parts'][part] / one['host']:.2%})" for part in PARTS]
        figures = (str(one["steps"]), f"{one['first_step'] * 1e3:.0f}–{one['last_step'] * 1e3:.0f}")
        grown = f"{one['parameters'][0]}→{one['parameters'][1]}"
        second.add_row(str(seed), *figures, f"{one['host']:.1f}", *cells, f"{one['overhead']:.2%}", grown)
    calls = [call(kind, QUICK_CALLS if chosen.quick else CALLS) for kind in KINDS]
    third = compare.titled("A call of growth.step where nothing is due, µs", ["batch", "least", "median"])
    for kind, taken in zip(KINDS, calls, strict=True):
        third.add_row(kind, f"{min(taken):.1f}", f"{statistics.median(taken):.1f}")
    judged = [
        *(
            Promise(
                f"growth.step where nothing is due, a {kind}: µs, median",
                statistics.median(taken),
                "<=",
                MOST,
                digits=1,
            )
            for kind, taken in zip(KINDS, calls, strict=True)
        ),
        *(
            Promise(f"{name}, {arm}: CPU time over bare, lower end", least(arms, arm), "<=", 1.0, digits=3)
            for name, arms in dormant.items()
            for arm in arms
            if (name, arm) in JUDGED
        ),
        Promise("a growing run: overhead", statistics.mean(one["overhead"] for one in runs), "<=", 0.05),
        Promise("widenings kept in it, least", min(one["kept"] for one in runs), ">=", 1, digits=0),
    ]
    rows = {"dormant": dormant, "runs": runs, "calls": dict(zip(KINDS, calls, strict=True))}
    return harness.conclude(NAME, chosen, [first, second, third], judged, rows)


# -- dormant -------------------------------------------------------------------------------------------------


def compared(name: str, rounds: int) -> dict[str, list[float]]:
    """Return seconds a step in every round, by arm; the arms take turns."""
    arms = {arm: stepper(name, arm) for arm in ARMS}
    taken: dict[str, list[float]] = {arm: [] for arm in arms}
    for step in arms.values():
        step(), step()
    for number in range(rounds):
        for arm in arms if number % 2 else reversed(arms):
            begun = time.thread_time()
            for _ in range(BURST[name]):
                arms[arm]()
            taken[arm].append((time.thread_time() - begun) / BURST[name])
    return taken


def stepper(name: str, arm: str) -> Callable[[], Any]:
    """Return one training step of a host."""
    torch.manual_seed(0)
    host: nn.Module
    if name == "MLP":
        host, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), torch.randn(64, 64)
    else:
        host, x = cnn(WIDTH), torch.randn(BATCH, 3, 32, 32)
    batch = x, torch.randint(10, (len(x),))
    optimizer = torch.optim.Adam(host.parameters(), lr=1e-3)
    kept: list[Any] = []
    if arm == "wrapped":
        kept.append(esper.wrap(host, x))
    if arm.startswith("growing"):
        config = {"schedule": {"warmup": 0.9, "plateau": False}}
        kept.append(
            esper.grow(host, optimizer, loss_fn, probe=[batch], steps=10**6, growth="incubate", config=config)
        )

    def step() -> None:
        optimizer.zero_grad()
        loss = loss_fn(host, batch)
        loss.backward()
        optimizer.step()
        if kept and isinstance(kept[0], Growth):
            kept[0].step(batch, loss)

    return step


def against(arms: Mapping[str, Sequence[float]], arm: str) -> list[float]:
    return sorted(one / bare for one, bare in zip(arms[arm], arms["bare"], strict=True))


def least(arms: Mapping[str, Sequence[float]], arm: str) -> float:
    """Return the lower end of the median's 95 % interval, by ranks: above 1 the arm is surely slower."""
    ratios = against(arms, arm)
    return ratios[max(round(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))) - 1, 0)]


def show(ratios: Sequence[float]) -> str:
    low, half, high = statistics.quantiles(ratios, n=4)
    return f"{half:.3f} [{low:.3f}, {high:.3f}]"


# -- a call where nothing is due -----------------------------------------------------------------------------

KINDS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "y": y},
}


def call(kind: str, steps: int) -> list[float]:
    """Train by the early recipe, far from its events; return the wall time in µs of each ``growth.step``."""
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    batch = KINDS[kind](torch.randn(64, 64), torch.randint(10, (64,)))
    optimizer = torch.optim.Adam(host.parameters(), lr=1e-3)

    def of(model: nn.Module, given: Any) -> Tensor:
        x, y = given.values() if isinstance(given, dict) else given
        return F.cross_entropy(model(x), y)

    growth = esper.grow(host, optimizer, of, probe=[batch], steps=10**6, growth="early")
    taken = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = of(host, batch)
        loss.backward()
        optimizer.step()
        begun = time.perf_counter_ns()
        growth.step(batch, loss)
        taken.append((time.perf_counter_ns() - begun) / 1e3)
    return taken


# -- a whole run ---------------------------------------------------------------------------------------------


def cnn(width: int) -> nn.Sequential:
    """Build a host for 3×32×32 images whose last layers are too narrow for ten digits."""
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, NARROW, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(NARROW, NARROW, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(NARROW, 10),
    )


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def placed(part: Batch, seed: int, copies: int) -> Batch:
    """Enlarge digits of 1×8×8 and put copies of each somewhere into 3×32×32, which takes longer to learn."""
    generator = torch.Generator().manual_seed(seed)
    digits = F.interpolate(part[0], size=DIGIT, mode="bilinear").repeat(copies, 1, 1, 1)
    canvas = torch.zeros(len(digits), 3, 32, 32)
    corners = torch.randint(33 - DIGIT, (len(digits), 2), generator=generator).tolist()
    for image, digit, (row, column) in zip(canvas, digits, corners, strict=True):
        image[:, row : row + DIGIT, column : column + DIGIT] = digit
    return canvas, part[1].repeat(copies)


def whole(seed: int, steps: int) -> dict[str, Any]:
    """Train and grow once; return CPU seconds by part."""
    split = data.digits(seed, images=True)
    train, probe = placed(split.train, seed, COPIES), placed(split.probe, seed, 1)
    torch.manual_seed(seed)
    host = cnn(WIDTH)
    optimizer = torch.optim.Adam(host.parameters(), lr=2e-3)
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(*train), BATCH, shuffle=True, drop_last=True, generator=order)
    clock, kept = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        journal = clock.around("telemetry", RunJournal(Path(folder)))

        def watch(event: Event) -> None:
            journal(event)
            if event.kind == "outcome":
                kept.append(bool(event.data["kept"]))

        held_out = [(probe[0][:PROBE], probe[1][:PROBE])]
        before = parameters(host)
        growth = esper.grow(
            host,
            optimizer,
            loss_fn,
            probe=held_out,
            steps=steps,
            budget={"growth_factor": 4.0},
            growth="incubate",
            seed=seed,
            on_event=watch,
        )
        instrument(growth, clock)
        own = trained(growth, optimizer, loader, steps)
        clock.around("bookkeeping", growth.finish)()
    return {**summed(own, clock), "steps": steps, "kept": sum(kept), "races": len(kept)} | {
        "parameters": [before, parameters(host)],
        "growth_flops": growth.cost.growth_flops,
        "training_flops": growth.cost.training_flops,
    }


def parameters(host: nn.Module) -> int:
    return sum(parameter.numel() for parameter in host.parameters())


def instrument(growth: Growth, clock: Clock) -> None:
    """Time every part of growth where it is called."""
    orchestrator: Any = growth.run.orchestrator
    for owner, name, part in (
        (orchestrator, "germinate", "incubation"),
        (orchestrator.racing, "learn", "incubation"),
        (orchestrator.racing, "judge", "evidence"),
        (orchestrator.exposing, "step", "kernels"),
        (growth.loop.incubation, "survey", "survey"),
        (growth.run.parts.committer, "commit", "surgery"),
        (growth, "step", "bookkeeping"),
    ):
        setattr(owner, name, clock.around(part, getattr(owner, name)))


Key = tuple[int, str]  # size of the host, what was awake


def trained(
    growth: Growth, optimizer: torch.optim.Optimizer, loader: Any, steps: int
) -> dict[Key, list[float]]:
    """Train; return the CPU seconds of the host's own steps by what was awake in them."""
    own: dict[Key, list[float]] = defaultdict(list)
    done = 0
    while done < steps:
        for batch in loader:
            layers: list[Any] = list(growth.run.morphable.layers.values())
            state = "dormant" if not layers else "exposed" if layers[0].exposed else "tapped"
            begun = time.thread_time()
            optimizer.zero_grad()
            loss = loss_fn(growth.model, batch)
            loss.backward()
            optimizer.step()
            own[growth.run.morphable.flops, state].append(time.thread_time() - begun)
            growth.step(batch, loss)
            done += 1
            if done == steps:
                break
    return own


def summed(own: Mapping[Key, Sequence[float]], clock: Clock) -> dict[str, Any]:
    """Split the steps into the host's own part and what an awake seed added; medians, by size."""
    parts = {part: clock.parts[part] for part in PARTS}
    sizes = sorted({size for size, _ in own})
    bare = {size: statistics.median(own[size, "dormant"]) for size in sizes if own.get((size, "dormant"))}
    host = 0.0
    for (size, state), taken in own.items():
        base = bare.get(size) or statistics.median(taken)  # a size at which no step was dormant
        host += base * len(taken)
        if state != "dormant":
            extra = (statistics.median(taken) - base) * len(taken)
            parts["kernels" if state == "exposed" else "incubation"] += extra
    total = sum(parts.values())
    steps = {f"{size} {state}": [len(v), statistics.median(v)] for (size, state), v in sorted(own.items())}
    return {
        "host": host,
        "parts": parts,
        "overhead": total / host,
        "host_steps": steps,
        "first_step": bare[sizes[0]],
        "last_step": bare[max(bare)],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
