"""Does a run that keeps nothing leave all as a run without Esper does: bits, draws, state, classes?"""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from benchmarks import compare, harness
from benchmarks.promises import Promise
from benchmarks.workers import workers

NAME = "side-effects"
SEEDS = 2
STEPS = 60
FALSE_KEEP = 1e-5  # labels are noise: events look, and none passes
CLASSES, WIDTH, ROWS = 5, 12, 640


class Around(nn.Module):
    """A host inside a model with a habit of its own.

    Args:
        inner: The host.
        habit: Called with this module and the input, in training; returns the input.
    """

    def __init__(self, inner: nn.Module, habit: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.habit = inner, habit
        self.tensor, self.count, self.history, self.seen = torch.zeros(()), 0, [0.0], {0: 0}
        self.last: Tensor | None = None
        self.generator = torch.Generator().manual_seed(1)
        self.numpy, self.python = np.random.default_rng(1), random.Random(1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.habit(self, x) if self.training else x)
        return y


def counts(own: Any, x: Tensor) -> Tensor:
    own.count += 1
    own.tensor += 1
    own.calls += 1
    return x


def remembers(own: Any, x: Tensor) -> Tensor:
    own.history.append(float(x.detach().mean()))
    own.seen[len(own.seen)] = len(own.seen)
    own.last = x.detach()
    return x


def draws(own: Any, x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=own.generator) + own.numpy.normal() + own.python.gauss(0, 1)
    return x + 0.01 * noise


def draws_globally(own: Any, x: Tensor) -> Tensor:
    return x + 0.01 * (torch.randn_like(x) + np.random.normal() + random.gauss(0, 1))


def nothing(own: Any, x: Tensor) -> Tensor:
    return x


HABITS = {
    "none": nothing,
    "counts": counts,
    "remembers": remembers,
    "draws from its own": draws,
    "draws from all": draws_globally,
}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x.view(len(x), 4, 3))[0][:, -1])
        return y


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layer(self.up(x.view(len(x), 4, 3))).mean(1))
        return y


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


def perceptron(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), *between, nn.Linear(8, CLASSES))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: perceptron(nn.ReLU()),
    "MLP with dropout": lambda: perceptron(nn.Tanh(), nn.Dropout(0.3)),
    "MLP with BatchNorm": lambda: perceptron(nn.BatchNorm1d(8), nn.ReLU()),
    "deep MLP": lambda: nn.Sequential(
        nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, 7), nn.GELU(), nn.Linear(7, CLASSES)
    ),
    "CNN": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.Flatten(),
        nn.Linear(36, CLASSES),
    ),
    "residual": lambda: nn.Sequential(Residual(), Residual(), nn.Linear(WIDTH, CLASSES)),
    "GRU": Recurrent,
    "attention": Attending,
}


@dataclass
class Left:
    """What a run has left behind."""

    weights: dict[str, Tensor]
    state: list[Any]
    streams: list[Any]
    drawn: list[Any]
    classes: list[Any]

    def differences(self, other: Left) -> list[str]:
        """List what another run left differently."""
        found = [] if equal(self.weights, other.weights) else ["weights"]
        for name in ("state", "streams", "drawn", "classes"):
            found += [] if equal(getattr(self, name), getattr(other, name)) else [name]
        return found


def equal(one: Any, other: Any) -> bool:
    """Compare nests of tensors, arrays and numbers, bit for bit."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def run(host: str, habit: str, seed: int, *, grows: bool, threaded: bool) -> tuple[Left, int]:
    """Train once; returns what is left, and the events that looked at something."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    x, y = torch.randn(ROWS, WIDTH), torch.randint(CLASSES, (ROWS,))
    net = Around(HOSTS[host](), HABITS[habit])
    shared = torch.Generator().manual_seed(seed)
    loader = DataLoader(TensorDataset(x[:256], y[:256]), 64, shuffle=True, generator=shared)
    probe = DataLoader(TensorDataset(x[256:], y[256:]), 128, shuffle=True, generator=shared)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    called: list[int] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        called.append(sum(type(layer) is nn.Linear for layer in model.modules()))
        return F.cross_entropy(model(batch[0]), batch[1])

    growth = None
    with Drawing(threaded) as drawing:
        if grows:
            settings = {"early": {"false_keep": FALSE_KEEP}}
            growth = esper.grow(
                net, optimizer, loss_fn, probe=probe, steps=STEPS, growth="early", config=settings
            )
        step = 0
        while step < STEPS:
            for batch in loader:
                loss = loss_fn(net, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if growth is not None:
                    growth.step(batch, loss)
                step += 1
        if growth is not None:
            growth.finish()
            assert not growth.plans, "labels of noise grew something"
    looked = 0 if growth is None or growth.loop.early is None else len(growth.loop.early.records)
    return left(net, shared, drawing.drawn, min(called), threaded), looked


class Drawing:
    """Another thread that draws from all global streams while a run goes on; its draws must not be disturbed.

    Args:
        threaded: Whether there is one. The run itself may then draw nothing.
    """

    def __init__(self, threaded: bool) -> None:
        self.threaded, self.done = threaded, threading.Event()
        self.drawn: list[Any] = []

    def __enter__(self) -> Drawing:
        """Begin."""
        self.thread = threading.Thread(target=self.draw)
        if self.threaded:
            self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        self.done.set()
        if self.threaded:
            self.thread.join()
            first = self.drawn[:500]  # how many more there are depends on the clock
            self.drawn = first

    def draw(self) -> None:
        """Draw, as long as the run goes on, and 500 times at least."""
        while not self.done.is_set() or len(self.drawn) < 500:
            if len(self.drawn) < 500:
                self.drawn.append((np.random.rand(), random.random()))
            self.done.wait(0.0005)


def left(net: Around, shared: torch.Generator, drawn: list[Any], called: int, threaded: bool) -> Left:
    """Note everything that Esper could have moved."""
    state = [net.tensor, net.count, net.history, net.seen, net.last]
    state += [net.generator.get_state(), net.numpy.bit_generator.state, net.python.getstate()]
    streams: list[Any] = [torch.get_rng_state(), shared.get_state()]
    streams += [] if threaded else [list(np.random.get_state()[1:3]), random.getstate()]
    classes = [[type(m).__qualname__, sorted(vars(m)), len(m._forward_hooks)] for m in net.modules()]
    return Left(copy.deepcopy(net.state_dict()), state, streams, drawn, [classes, called])


def compared(case: tuple[str, str, bool], seed: int) -> tuple[str, list[str], int]:
    """Run a case with Esper and without; returns its name, what differs, and the events that looked."""
    host, habit, threaded = case
    without, _ = run(host, habit, seed, grows=False, threaded=threaded)
    grown, looked = run(host, habit, seed, grows=True, threaded=threaded)
    name = f"{host}, {habit}{', beside a drawing thread' if threaded else ''}"
    return name, without.differences(grown), looked


def main(argv: Sequence[str]) -> int:
    """Compare every host with every habit with its twin; list what differs."""
    chosen = harness.options(NAME, __doc__, argv, seeds=SEEDS)
    cases = [(host, habit, False) for host in HOSTS for habit in HABITS]
    cases += [(host, "none", True) for host in HOSTS]
    found: list[tuple[str, list[str], int]] = []
    with workers(chosen.jobs) as pool:
        for seed in range(1 if chosen.quick else chosen.seeds):
            found += pool.map(partial(compared, seed=seed), cases, NAME)
    table = compare.titled(
        f"Runs that keep nothing, {len(found)}", ["host and habit", "events", "differs in"]
    )
    for name, differences, looked in found:
        table.add_row(name, str(looked), ", ".join(differences) or "–")
    judged = [
        Promise("hosts and habits", len(cases), ">=", 40, digits=0),
        Promise(
            "runs that looked at places", sum(looked > 0 for *_, looked in found) / len(found), ">=", 0.9
        ),
        Promise("runs that differ from their twin", sum(bool(d) for _, d, _ in found), "<=", 0, digits=0),
    ]
    figures = {"runs": [{"case": n, "differs": d, "events": looked} for n, d, looked in found]}
    return harness.conclude(NAME, chosen, [table], judged, figures)
