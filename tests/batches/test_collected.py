"""Batches as they were collected, and containers whose own methods fail."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.batches.examples import count_examples, join, split_batch, take
from esper.batches.known import rows_of
from esper.errors import ProbeError
from tests.cases.loops import Task, cross_entropy, narrow, run


def pairs(x: Tensor, y: Tensor) -> list[tuple[Tensor, int]]:
    return [(one, int(label)) for one, label in zip(x, y, strict=True)]


def ragged(x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    return [{"x": one, "y": label, **({"w": 1} if label % 2 else {})} for one, label in pairs(x, y)]


MADE: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Any]]]] = {
    "lists": (
        lambda x, y: [[one, label] for one, label in zip(x, y, strict=True)],
        lambda b: (torch.stack([x for x, _ in b]), torch.stack([y for _, y in b])),
    ),
    "tuple": (
        lambda x, y: tuple(pairs(x, y)),
        lambda b: (torch.stack([x for x, _ in b]), torch.tensor([y for _, y in b])),
    ),
    "some say more": (
        ragged,
        lambda b: (torch.stack([one["x"] for one in b]), torch.tensor([one["y"] for one in b])),
    ),
    "zipped": (
        lambda x, y: tuple(zip(*pairs(x, y), strict=True)),
        lambda b: (torch.stack(b[0]), torch.tensor(b[1])),
    ),
    "zipped tensors": (
        lambda x, y: tuple(zip(*zip(x, y, strict=True), strict=True)),
        lambda b: (torch.stack(b[0]), torch.stack(b[1])),
    ),
    "zipped tables": (
        lambda x, y: tuple(zip(*[(one, {"y": label}) for one, label in pairs(x, y)], strict=True)),
        lambda b: (torch.stack(b[0]), torch.tensor([one["y"] for one in b[1]])),
    ),
    "array of texts": (
        lambda x, y: (x, np.array([str(int(one)) for one in y])),
        lambda b: (b[0], torch.tensor([int(one) for one in b[1]])),
    ),
    "array of objects": (
        lambda x, y: (x, np.array(y.tolist(), dtype=object)),
        lambda b: (b[0], torch.tensor(list(b[1]))),
    ),
}


@pytest.mark.parametrize("kind", MADE)
def test_examples_count_as_they_do_in_tensors(kind: str) -> None:
    made, read = MADE[kind]
    task, plain, net, twin = Task(), Task(), narrow(), narrow()
    probe = [made(*Task(7)(100)), made(*Task(8)(100))]
    ran = run(net, lambda m, b: cross_entropy(m, read(b)), lambda n=48: made(*task(n)), probe, steps=40)
    run(twin, cross_entropy, plain, [Task(7)(100), Task(8)(100)], steps=40)
    assert torch.equal(net[0].weight, twin[0].weight), "the same as tensors"
    assert net[0].out_features > 1
    assert not ran.warnings


@pytest.mark.parametrize("kind", MADE)
def test_collected_batches_are_cut_and_joined(kind: str) -> None:
    made, read = MADE[kind]
    x, y = Task()(9)
    whole = made(x, y)
    assert count_examples(whole) == split_batch(whole)[3] == 9
    assert len(rows_of(whole)[0]) == 9
    few = take(whole, torch.tensor([5, 2]))
    assert type(few) is type(whole) or isinstance(few, list)
    assert torch.equal(read(few)[0], x[[5, 2]])
    (both,) = join([whole, made(*Task(2)(7))])
    assert read(both)[0].shape == (16, 10)


def test_a_few_collected_examples_are_told_by_their_labels() -> None:
    x, y = Task()(4)
    for n in (2, 3, 4):
        assert count_examples(pairs(x[:n], y[:n])) == n
        assert count_examples(ragged(x[:n], y[:n])) == n
    assert count_examples([(x, x), (y, y)]) == 4, "two parts with two each"
    assert count_examples([(x, 1.0), (y, 0.5)]) == 4, "parts with a weight each"
    assert count_examples(((x[:, :5], x[:, 5:]), (y, y))) == 4
    assert count_examples((tuple(x.chunk(5, 1)), y)) == 4, "five inputs"
    assert count_examples([x, ["a"] * 4, [1] * 4, [2] * 4, [3] * 4]) == 4, "columns"


class Failing(UserDict[str, Tensor]):
    """A mapping of which one method fails."""

    fails = ""

    def keys(self) -> Any:
        """Fail, perhaps."""
        if self.fails == "keys":
            raise KeyError("of its own")
        return super().keys()

    def __iter__(self) -> Iterator[str]:
        """Fail, perhaps."""
        if self.fails == "keys":
            raise KeyError("of its own")
        return super().__iter__()

    def __getitem__(self, key: str) -> Tensor:
        """Fail, perhaps."""
        if self.fails == "get":
            raise RuntimeError("of its own")
        return super().__getitem__(key)


class Lengthless(list[Tensor]):
    """A list that does not say how long it is."""

    def __len__(self) -> int:
        """Fail."""
        raise RuntimeError("of its own")


def failing(how: str, x: Tensor, y: Tensor) -> Any:
    if how == "len":
        return Lengthless([x, y])
    made = Failing(x=x, y=y)
    made.fails = how
    return made


def by_data(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch.data.values() if isinstance(batch, UserDict) else (batch[0], batch[1])
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("mode", ["early", "incubate"])
@pytest.mark.parametrize("how", ["keys", "get", "len"])
def test_a_container_whose_methods_fail(how: str, mode: Literal["early", "incubate"]) -> None:
    task = Task()
    with pytest.raises(ProbeError, match=r"cannot be taken apart: .*of its own"):
        run(narrow(), by_data, lambda n=48: failing(how, *task(n)), growth=mode)
    net = narrow()
    optimizer, warned = torch.optim.Adam(net.parameters(), 0.01), list[str]()

    def told(event: Any) -> None:
        warned.extend([event.data["message"]] if event.kind == "warning" else [])

    growth = esper.grow(net, optimizer, by_data, probe=[task(256)], steps=40, growth=mode, on_event=told)
    for i in range(40):
        x, y = task()
        batch = failing(how, x, y) if i % 7 == 3 else (x, y)
        loss = by_data(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step(batch, loss)
    growth.finish()
    assert growth.steps == 40
    passed_over = [one for one in warned if "passed over" in one]
    assert len(passed_over) == 1, "told once"
    assert mode == "incubate" or growth.plans


def test_the_first_batch_of_a_loop_must_be_readable() -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters())
    growth = esper.grow(net, optimizer, cross_entropy, probe=[Task()(64)], steps=40)
    with pytest.raises(ProbeError, match="no tensor with a batch axis"):
        growth.step(None, cross_entropy(net, Task()()))


@pytest.mark.parametrize("mode", ["early", "incubate"])
def test_batches_of_no_or_one_example_cost_no_event(mode: Literal["early", "incubate"]) -> None:
    task, net = Task(), narrow()
    optimizer, warned = torch.optim.Adam(net.parameters(), 0.01), list[str]()

    def told(event: Any) -> None:
        warned.extend([event.data["message"]] if event.kind == "warning" else [])

    growth = esper.grow(
        net, optimizer, cross_entropy, probe=[task(256)], steps=40, growth=mode, on_event=told
    )
    for i in range(40):
        x, y = task()
        loss = cross_entropy(net, (x, y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        few = {1: 0, 2: 1}.get(i % 4, 48)
        growth.step((x[:few], y[:few]), loss)
    growth.finish()
    assert growth.plans
    assert not warned


class Going:
    """A probe whose file is gone after some readings."""

    def __init__(self, left: int) -> None:
        self.batches, self.left = [Task()(256)], iter(range(left))  # a counter in plain sight is put back

    def __iter__(self) -> Iterator[Any]:
        """Read it, or fail."""
        if next(self.left, None) is None:
            raise OSError("gone")
        return iter(self.batches)


@pytest.mark.parametrize("mode", ["early", "incubate"])
def test_a_probe_that_fails_after_some_readings(mode: Literal["early", "incubate"]) -> None:
    refused, left = list[str](), 0
    while len(refused) == left:
        try:
            ran = run(narrow(), probe=Going(left), steps=20, growth=mode, config={})
        except ProbeError as error:
            refused.append(str(error))
        left += 1
    assert len(refused) > 2
    assert all("OSError: gone" in one for one in refused)
    assert ran.growth.steps == 20
