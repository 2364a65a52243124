"""What a sampler or a loader of the user's own counts is as it was after each of Esper's readings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Sampler, TensorDataset

import esper
from tests.cases.loops import Batch, Task, cross_entropy, narrow


class Counting(Sampler[int]):
    """Knows how often it was read, and what it gave last."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch, self.log, self.seen, self.marks = length, 0, [torch.zeros(2)], {"a": 0}, {0}

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        self.log.append(torch.ones(2))
        self.seen["a"] += 1
        self.marks.add(self.epoch)
        yield from range(self.length)

    def __len__(self) -> int:
        return self.length

    @property
    def facts(self) -> tuple[object, ...]:
        return self.epoch, len(self.log), dict(self.seen), set(self.marks)


class InBatches(Counting):
    """The same, batch by batch."""

    def __iter__(self) -> Iterator[Any]:
        yield from ([*range(i, i + 64)] for i in range(0, 64 * sum(1 for _ in super().__iter__()), 64))


class Loader(Counting):
    """A loader of the user's own."""

    def __iter__(self) -> Iterator[Any]:
        yield from (DATA[i * 64 : i * 64 + 64] for i in super().__iter__())


DATA = TensorDataset(*Task()(2048))


def by_samples() -> tuple[Iterable[Any], Counting]:
    sampler = Counting(len(DATA))
    return DataLoader(DATA, 64, sampler=sampler), sampler


def by_batches() -> tuple[Iterable[Any], Counting]:
    sampler = InBatches(32)
    return DataLoader(DATA, batch_sampler=sampler), sampler


def own() -> tuple[Iterable[Any], Counting]:
    loader = Loader(32)
    return loader, loader


@pytest.mark.parametrize("growth", ["early", "incubate"])
@pytest.mark.parametrize("made", [by_samples, by_batches, own])
def test_samplers_and_loaders_count_only_the_users_own_readings(
    made: Callable[[], tuple[Iterable[Batch], Counting]], growth: Any
) -> None:
    probe, sampler = made()
    next(iter(probe))  # the user's own
    before, log, seen = sampler.facts, sampler.log, sampler.seen
    net, draw = narrow(), Task()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    run = esper.grow(net, optimizer, cross_entropy, probe=probe, steps=100, growth=growth)
    assert sampler.facts == before
    for _ in range(100):
        batch = draw()
        loss = cross_entropy(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.step(batch, loss)
        assert sampler.facts == before
    run.finish()
    assert sampler.facts == before
    assert sampler.log is log
    assert sampler.seen is seen
