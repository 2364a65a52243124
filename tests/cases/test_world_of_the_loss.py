"""What a loss, a model or a hook writes to shows as many calls as the user's loop made: kind J."""

from __future__ import annotations

import gc
import itertools
import queue
import random
import sys
import threading
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.surgery.isolation.surroundings import Surroundings
from tests.cases.loops import Task, cross_entropy, narrow, run

STEPS = 40
MODES = ["early", "incubate"]
Mode = Literal["early", "incubate"]

HISTORY: list[int] = []
COUNT = 0
COUNTER: Counter[str] = Counter()
ELSEWHERE = ModuleType("elsewhere_of_the_loss")


class Statistics:
    """Counts in a class."""

    calls = 0
    log: ClassVar[list[int]] = []


class Meter:
    """An average as loops keep them."""

    def __init__(self) -> None:
        self.sum, self.count, self.values, self.inner = 0.0, 0, [0], OrderedDict(a=[0])

    def update(self, value: float) -> None:
        """Take one in."""
        self.sum, self.count = self.sum + value, self.count + 1
        self.values.append(self.count)
        self.inner["a"].append(self.count)
        self.inner.move_to_end("a")


class Slotted:
    """Has no table of attributes."""

    __slots__ = ("later", "n")

    def __init__(self) -> None:
        self.n = 0


def note() -> None:
    """Write to what lies two calls away."""
    global COUNT
    COUNT += 1
    COUNTER["n"] += 1
    deeper()


def deeper() -> None:
    """Write to another module."""
    ELSEWHERE.calls += 1  # type: ignore[attr-defined]
    HISTORY.append(COUNT)


def everywhere() -> tuple[Callable[..., Tensor], Callable[[], dict[str, object]]]:
    """Return a loss that writes wherever one can, and what shows how often."""
    number, table, last, marks = 0, {"a": [0], "b": {0: 0}}, deque([0], maxlen=5), {0}
    tensor, array, raw = torch.zeros(()), np.zeros(3), bytearray(b"\0")
    meter, slotted, waiting = Meter(), Slotted(), queue.Queue[int]()
    torchs, pythons = torch.Generator().manual_seed(0), random.Random(0)
    numpys, old = np.random.default_rng(0), np.random.RandomState(0)

    def loss(model: nn.Module, batch: Any, kept: list[int] = [], *, named: list[int] = []) -> Tensor:  # noqa: B006
        nonlocal number
        value = cross_entropy(model, batch)
        number += 1
        table["a"].append(number)
        table["b"][number] = 1
        last.append(number)
        marks.add(number)
        tensor.add_(1)
        array[0] += 1
        raw[0] = number % 256
        kept.append(1)
        named.append(1)
        meter.update(1.0)
        slotted.n += 1
        slotted.later = number
        waiting.put(number)
        Statistics.calls += 1
        Statistics.log.append(1)
        note()
        drawn = float(torch.rand((), generator=torchs)) + pythons.random() + numpys.random() + old.rand()
        return value + 0 * drawn

    def shown() -> dict[str, object]:
        return {
            "nonlocal": number,
            "containers": (len(table["a"]), len(table["b"]), list(last), len(marks), bytes(raw)),
            "arrays": (float(tensor), float(array[0])),
            "defaults": (len(loss.__defaults__[0]), len(loss.__kwdefaults__["named"])),
            "object": (meter.sum, meter.count, len(meter.values), len(meter.inner["a"])),
            "slots": (slotted.n, slotted.later),
            "queue": (waiting.qsize(), waiting.unfinished_tasks),
            "class": (Statistics.calls, len(Statistics.log)),
            "globals": (COUNT, COUNTER["n"], len(HISTORY), ELSEWHERE.calls),  # type: ignore[attr-defined]
            "drawn": (float(torch.rand((), generator=torchs)), pythons.random(), numpys.random(), old.rand()),
        }

    return loss, shown


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    global COUNT
    COUNT = Statistics.calls = ELSEWHERE.calls = 0  # type: ignore[attr-defined]
    sys.modules[ELSEWHERE.__name__] = ELSEWHERE
    for one in (HISTORY, COUNTER, Statistics.log):
        one.clear()
    yield
    del sys.modules[ELSEWHERE.__name__]


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_writes_everywhere(mode: Mode) -> None:
    loss, shown = everywhere()
    ran = run(narrow(), loss, steps=STEPS, growth=mode, config={"gate": {"false_keep": 0.5}})
    assert mode == "incubate" or ran.growth.plans
    found = shown()
    forgotten_now, task, net = everywhere(), Task(), narrow()
    for name in (HISTORY, COUNTER, Statistics.log):
        name.clear()
    global COUNT
    COUNT = Statistics.calls = ELSEWHERE.calls = 0  # type: ignore[attr-defined]
    twin, expected = forgotten_now
    for _ in range(STEPS):
        twin(net, task())
    assert found == expected()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["method", "callable", "partial", "per_example"])
def test_losses_of_every_kind(kind: str, mode: Mode) -> None:
    class Trainer:
        """Holds the model and counts its losses."""

        def __init__(self) -> None:
            self.net, self.calls, self.meter, self.counted = narrow(), 0, Meter(), [0]

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            """Return the loss."""
            self.calls += 1
            self.meter.update(1.0)
            return cross_entropy(model, batch)

        __call__ = loss

        def each(self, model: nn.Module, batch: Any) -> Tensor:
            """Return losses of examples, which only Esper asks for."""
            self.counted.append(1)
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    trainer = Trainer()
    losses: dict[str, Any] = {
        "method": trainer.loss,
        "callable": trainer,
        "partial": partial(Trainer.loss, trainer),
        "per_example": trainer.loss,
    }
    given = {"per_example": trainer.each} if kind == "per_example" else {}
    run(trainer.net, losses[kind], steps=STEPS, growth=mode, config={}, **given)
    assert (trainer.calls, trainer.meter.count, len(trainer.counted)) == (STEPS, STEPS, 1)


@pytest.mark.parametrize("mode", MODES)
def test_forwards_hooks_and_modules_outside(mode: Mode) -> None:
    seen: Counter[str] = Counter()
    acts: dict[str, Tensor] = {}

    def counting(name: str) -> Callable[..., None]:
        def hook(*given: object) -> None:
            seen[name] += 1

        return hook

    class Criterion(nn.Module):
        """Counts as metrics do, in tensors and numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.calls, self.total = 0, torch.zeros(())
            self.register_buffer("there", torch.zeros(()))

        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            """Return the loss."""
            self.calls += 1
            self.total = self.total + 1
            self.there += 1
            return F.cross_entropy(y, t)

    class Net(nn.Module):
        """Counts in an object it holds, and outside."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.meter, self.stem, self.mid = Meter(), nn.Linear(10, 10), nn.ReLU()
            self.a, self.b = nn.Linear(10, 1), nn.Linear(1, 10)

        def forward(self, x: Tensor) -> Tensor:
            """Return logits."""
            self.meter.update(1.0)
            seen["forward"] += 1
            return self.b(torch.tanh(self.a(self.mid(self.stem(x)))))

    net, criterion = Net(), Criterion()
    net.stem.register_forward_hook(counting("hook"))
    net.stem.register_forward_hook(lambda m, a, y: acts.__setitem__(f"stem {len(acts)}", y.detach()))
    net.mid.register_full_backward_hook(counting("backward"))
    net.stem.weight.register_hook(counting("parameter"))
    net.stem.bias.register_post_accumulate_grad_hook(counting("accumulated"))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        y = model(batch[0])
        if y.requires_grad:
            y.register_hook(counting("output"))
        return criterion(y, batch[1])

    run(net, loss, steps=STEPS, growth=mode, sites="a>b", config={})
    names = ("forward", "hook", "backward", "parameter", "accumulated", "output")
    assert {name: seen[name] for name in names} == dict.fromkeys(names, STEPS)
    assert (net.meter.count, len(acts)) == (STEPS, STEPS)
    assert (criterion.calls, int(criterion.total), int(criterion.there)) == (STEPS, STEPS, STEPS)


@pytest.mark.parametrize("what", ["count", "file", "tensor"])
def test_what_cannot_be_put_back_is_told_once(what: str, tmp_path: Any) -> None:
    numbers, large = itertools.count(), torch.zeros(10**5)
    with (tmp_path / "log").open("w") as file:

        def counts(model: nn.Module, batch: Any) -> Tensor:
            next(numbers)
            return cross_entropy(model, batch)

        def writes(model: nn.Module, batch: Any) -> Tensor:
            file.write("x")
            return cross_entropy(model, batch)

        def adds(model: nn.Module, batch: Any) -> Tensor:
            large.add_(1)
            return cross_entropy(model, batch)

        loss, said = {
            "count": (counts, "a count"),
            "file": (writes, "a TextIOWrapper"),
            "tensor": (adds, r"a tensor of shape \(100000,\)"),
        }[what]
        ran = run(narrow(), loss, steps=STEPS)
    told = [warning for warning in ran.warnings if "put back" in warning]
    assert len(told) == 1
    assert told[0].startswith(f"loss_fn uses {said}".replace("\\", ""))


def test_a_queue_that_other_threads_fill_is_theirs() -> None:
    filled: queue.Queue[int] = queue.Queue()
    stop = threading.Event()

    def fill() -> None:
        while not stop.wait(0.001):
            filled.put(1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        filled.qsize()
        return cross_entropy(model, batch)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        ran = run(narrow(), loss, steps=STEPS)
    finally:
        stop.set()
        thread.join()
    assert filled.qsize() == filled.unfinished_tasks
    assert any("a queue" in warning for warning in ran.warnings)


def around(function: Any) -> Surroundings:
    return Surroundings(function, narrow())


def test_long_containers_lose_what_was_added() -> None:
    many, table = list(range(9999)), dict.fromkeys(range(9999))

    def loss() -> None:
        many.append(0)
        table[-1] = None

    with around(loss).same():
        loss()
    assert many == list(range(9999))
    assert list(table) == many


def test_containers_keep_their_identity_and_order_and_errors_pass() -> None:
    inner: list[Any] = [1]
    table: dict[str, Any] = {"b": inner, "a": 2}

    def loss() -> None:
        table["b"] = 0
        del table["a"]
        table["c"] = 1
        inner.append(torch.zeros(2))
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"), around(loss).same():
        loss()
    assert list(table.items()) == [("b", [1]), ("a", 2)]
    assert table["b"] is inner


def test_a_tensor_that_learns_and_what_is_not_touched_stay_what_they_are() -> None:
    weight, fixed = torch.zeros(3, requires_grad=True), torch.zeros(3)

    def loss() -> Tensor:
        return (weight * 2).sum() + fixed.sum()

    known = around(loss)
    with known.same():
        value = loss()
    value.backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert fixed._version == weight._version == 0
    assert known.lost == {}


def test_a_loss_that_reaches_nothing_costs_nothing() -> None:
    assert around(cross_entropy).empty


def test_nothing_holds_the_model_afterwards() -> None:
    class Owner:
        """Holds its model."""

        def __init__(self) -> None:
            self.net = narrow()

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            """Return the loss."""
            return cross_entropy(model, batch)

    owner = Owner()
    optimizer = torch.optim.Adam(owner.net.parameters())
    growth: Any = esper.grow(owner.net, optimizer, owner.loss, probe=[Task()(128)], steps=STEPS)
    held = weakref.ref(owner.net)
    del owner, optimizer, growth
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("mode", MODES)
def test_what_an_observer_writes_lasts(mode: Mode) -> None:
    """Events are told in the midst of passes, too, where what the loss reaches is put back."""

    class Trainer:
        """Keeps the events of its run beside its losses."""

        def __init__(self) -> None:
            self.net, self.calls, self.events = narrow(), 0, list[Any]()

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            """Return a loss that vmap cannot run, which is told as it is judged."""
            self.calls += 1
            value = cross_entropy(model, batch)
            return value if value.item() >= 0 else -value

    trainer, plain, draw = Trainer(), list[Any](), Task()

    def told(event: Any) -> None:
        plain.append(event)
        trainer.events.append(event)

    optimizer = torch.optim.Adam(trainer.net.parameters(), 0.01)
    growth = esper.grow(
        trainer.net, optimizer, trainer.loss, probe=[draw(256)], steps=STEPS, growth=mode, on_event=told
    )
    for _ in range(STEPS):
        batch = draw()
        loss = trainer.loss(trainer.net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step(batch, loss)
    growth.finish()
    assert trainer.calls == STEPS
    assert trainer.events == plain
    kinds = {event.kind for event in plain}
    assert "run_finished" in kinds
    assert mode == "early" or "fallback" in kinds
