"""What is the user's stays as it is, whatever Esper's passes do: kinds J, A18 and C of the cases."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

import esper
from esper.kasmina.evidence.sight import dead
from esper.surgery.isolation.draws import own_draws
from tests.cases.loops import Task, cross_entropy, narrow, run

STEPS = 60


class Stateful(nn.Module):
    """Keeps all sorts of state in plain attributes, and a table that renormalises itself."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor, self.count, self.history, self.seen = torch.zeros(()), 0, [0.0], {0: 0}
        self.last: Tensor | None = None
        self.generator = torch.Generator().manual_seed(0)
        self.numpy, self.python = np.random.default_rng(0), random.Random(0)
        self.a, self.b = nn.Linear(10, 2), nn.Linear(2, 10)
        self.table = nn.Embedding(4, 10, max_norm=0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Change all of it, in training."""
        if self.training:
            self.tensor += 1
            self.count += 1
            self.history.append(float(self.count))
            self.seen[self.count] = self.count
            self.last = x.detach()
            noise = torch.randn(1, generator=self.generator) + self.numpy.normal() + self.python.random()
            x = x + 0.0 * float(noise)
        return self.b(torch.tanh(self.a(x))) + self.table(torch.zeros(len(x), dtype=torch.long))


def test_plain_attributes_count_the_users_passes_only() -> None:
    torch.manual_seed(0)
    net = Stateful()
    ran = run(net, steps=STEPS)
    assert ran.growth.loop.early is not None
    assert [r for r in ran.growth.loop.early.records if r.verdict == "kept"], "there were events"
    assert (int(net.tensor), net.count, len(net.history), len(net.seen)) == (
        STEPS,
        STEPS,
        STEPS + 1,
        STEPS + 1,
    )
    drawn = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        torch.randn(1, generator=drawn)
    assert torch.equal(drawn.get_state(), net.generator.get_state())


def test_the_start_leaves_tables_averages_and_heads_outside_alone() -> None:
    class Momentum(nn.Module):
        """Moves a frozen copy of a layer as it trains."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(10, 2), nn.Linear(2, 3)
            self.slow = nn.Linear(2, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            """Return features."""
            if self.training:
                self.slow.bias.data.lerp_(self.b.bias.data, 0.1)
            return self.b(torch.tanh(self.a(x)))

    torch.manual_seed(0)
    net, head = Momentum(), nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 10))
    before = net.slow.bias.clone()
    optimizer = torch.optim.Adam([p for p in (*net.parameters(), *head.parameters()) if p.requires_grad])
    draw = Task()
    growth = esper.grow(
        net,
        optimizer,
        lambda model, batch: F.cross_entropy(head(model(batch[0])), batch[1]),
        probe=[draw(128), draw(128)],
        steps=STEPS,
    )
    assert torch.equal(net.slow.bias, before)
    assert int(head[0].num_batches_tracked) == 0
    assert head.training
    growth.finish()


def test_other_threads_draw_what_they_would_have_drawn() -> None:
    """Streams of torch, numpy and Python are one for the process: none is moved under another thread."""
    net, task = narrow(), Task()  # both draw: before the thread does
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    drawn: list[tuple[float, float, float]] = []
    ready, done = threading.Event(), threading.Event()

    def draw() -> None:
        generator = torch.default_generator
        while not done.is_set() or len(drawn) < 500:
            with LOCK:
                drawn.append((float(torch.rand(1, generator=generator)), np.random.rand(), random.random()))
            ready.set()

    LOCK = threading.Lock()
    thread = threading.Thread(target=draw)
    thread.start()
    ready.wait()
    try:
        run(net, draw=task, steps=STEPS)
    finally:
        done.set()
        thread.join()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    expected = [(float(torch.rand(1)), np.random.rand(), random.random()) for _ in drawn]
    assert drawn == expected


def test_draws_of_ones_own_are_those_of_the_default_stream() -> None:
    def everything() -> list[Tensor]:
        x = torch.linspace(-1, 1, 12).view(4, 3)
        return [
            F.dropout(x, 0.5),
            torch.rand(3),
            torch.randn_like(x),
            torch.rand_like(x),
            torch.randint(5, (2,)),
            torch.randperm(4),
            torch.randint_like(x, 4),
            torch.normal(x, 1.0),
            torch.bernoulli(x.sigmoid()),
            torch.multinomial(x.softmax(-1), 1),
            F.alpha_dropout(x, 0.5, training=True),
            F.gumbel_softmax(x),
            F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
            torch.distributions.Gamma(1.0, 1.0).sample(),
            nn.Linear(3, 2).weight,
        ]

    torch.manual_seed(7)
    wanted = everything()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with own_draws(7):
        found = everything()
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert torch.equal(before, torch.get_rng_state())
    with own_draws(7):
        first = torch.rand(2)
        with own_draws(7):
            assert torch.equal(torch.rand(2), first)
        second = torch.rand(2)
    with own_draws(7):
        assert torch.equal(torch.rand(4)[2:], second), "what is drawn inside is not drawn outside"


class Dispatch(nn.Module):
    """Calls its layers by their type."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(10, 1), nn.Tanh(), nn.Linear(1, 10)])

    def forward(self, x: Tensor) -> Tensor:
        """Look every layer's class up."""
        calls: dict[type, Callable[[nn.Module, Tensor], Tensor]] = {
            nn.Linear: lambda layer, value: layer(value),
            nn.Tanh: lambda layer, value: torch.tanh(value),
        }
        for layer in self.layers:
            x = calls[type(layer)](layer, x)
        return x


def test_layers_keep_their_class_in_every_pass() -> None:
    torch.manual_seed(0)
    seen: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        own = [layer for layer in model.modules() if type(layer) is nn.Linear]
        seen.append(len(own))
        return cross_entropy(model, batch) + 1e-4 * sum(layer.weight.square().sum() for layer in own)

    net = Dispatch()
    assert run(net, loss=loss, steps=STEPS).outcomes()
    assert set(seen) == {2}


def test_a_register_of_subclasses_is_left_alone() -> None:
    class Named(nn.Linear):
        """A layer whose subclasses must say what they are called."""

        def __init_subclass__(cls, *, name: str, **rest: Any) -> None:
            super().__init_subclass__(**rest)

    torch.manual_seed(0)
    assert run(nn.Sequential(Named(10, 1), nn.Tanh(), nn.Linear(1, 10)), steps=STEPS).outcomes()


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Add to what comes in."""
        return x + self.b(torch.relu(self.a(x)))


class Dropped(nn.Module):
    """Blocks that chance leaves out in training."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.first, self.last, self.share = nn.Linear(10, 8), nn.Linear(8, 10), share
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Go through some of the blocks."""
        x = self.first(x)
        for block in self.blocks:
            if not (self.training and float(torch.rand(())) < self.share):
                x = block(x)
        return self.last(x)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_stochastic_depth_hides_no_place(share: float) -> None:
    torch.manual_seed(0)
    ran = run(Dropped(share), steps=STEPS)
    widths = [f"blocks.{i}.a>blocks.{i}.b" for i in range(4)]
    assert [name for name in ran.growth.run.morphable.places if name in widths] == widths
    assert ran.outcomes()


@pytest.mark.parametrize("still", ["frozen", "rate 0"])
def test_what_does_not_learn_is_not_widened(still: str) -> None:
    torch.manual_seed(0)
    net = narrow()
    groups: list[dict[str, Any]] = [{"params": net[0].parameters()}]
    if still == "frozen":
        net[2].requires_grad_(False)
    else:
        groups.append({"params": net[2].parameters(), "lr": 0.0})
    ran = run(net, optimizer=torch.optim.Adam(groups, lr=0.01), steps=STEPS, growth="early")
    assert net[0].out_features == 1
    wanted = "2 is frozen" if still == "frozen" else "2 has a learning rate of 0"
    assert any(wanted in reason for reason in ran.reasons)


def test_what_learns_later_is_widened_then() -> None:
    torch.manual_seed(0)
    net = narrow()
    net[2].requires_grad_(False)

    def each(i: int, growth: esper.Growth) -> None:
        if i == 12:
            net[2].requires_grad_(True)

    ran = run(net, optimizer=torch.optim.Adam(net.parameters(), lr=0.01), each=each, growth="early")
    assert any("2 is frozen" in reason for reason in ran.reasons), "an event came before"
    assert net[0].out_features > 1


def test_dead_units_are_counted_along_their_axis() -> None:
    x = torch.zeros(4, 3, 7)
    x[:, 0] = 1.0
    assert dead(x) == pytest.approx(2 / 3)
    assert dead(x.movedim(1, -1), -1) == pytest.approx(2 / 3)


class Ordered(Sampler[int]):
    """Draws its order from a generator of its own."""

    def __init__(self, count: int) -> None:
        self.count, self.drawn = count, np.random.default_rng(0)

    def __iter__(self) -> Iterator[int]:
        """Return another order every time."""
        return iter(self.drawn.permutation(self.count).tolist())

    def __len__(self) -> int:
        """Count the examples."""
        return self.count


class Jittered(Dataset[Any]):
    """Adds noise from generators of its own."""

    def __init__(self) -> None:
        self.x, self.y = Task(7)(256)
        self.noise, self.python = torch.Generator().manual_seed(1), random.Random(1)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.y)

    def __getitem__(self, index: int) -> Any:
        """Return an example."""
        jitter = 0.1 * torch.randn(10, generator=self.noise)
        return self.x[index] + jitter + self.python.gauss(0, 0.01), self.y[index]


@pytest.mark.parametrize("recipe", ["early", "incubate"])
def test_generators_of_a_probes_sampler_and_data_stay_where_they_are(
    recipe: Literal["early", "incubate"],
) -> None:
    data, order = Jittered(), Ordered(256)
    before = data.noise.get_state(), data.python.getstate(), order.drawn.bit_generator.state
    ran = run(narrow(), probe=DataLoader(data, 64, sampler=order), steps=STEPS, growth=recipe)
    assert ran.growth.plans
    assert torch.equal(before[0], data.noise.get_state())
    assert before[1] == data.python.getstate()
    assert before[2] == order.drawn.bit_generator.state
