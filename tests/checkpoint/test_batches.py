"""An epoch that was left in the middle goes on with the batches it would have had."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler

from esper.checkpoint import Batches
from esper.checkpoint.contents.randomness import capture_randomness, restore_randomness
from esper.errors import ConfigError, StateError


class Noisy(Dataset[float]):
    reads = 0

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> float:
        self.reads += 1
        return index + float(torch.rand(())) / 2 + random.random() / 4 + float(np.random.rand()) / 8


class Stream(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        for index in range(12):
            yield index + float(torch.rand(()))


class Shuffled:
    """Not a DataLoader: draws from Python's stream."""

    def __iter__(self) -> Iterator[int]:
        order = list(range(6))
        random.shuffle(order)
        return iter(order)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), 2, shuffle=True),
    "own generator": lambda: DataLoader(Noisy(), 2, shuffle=True, generator=generator()),
    "two workers": lambda: DataLoader(Noisy(), 2, shuffle=True, generator=generator(), num_workers=2),
    "workers, global stream": lambda: DataLoader(Noisy(), 2, shuffle=True, num_workers=2),
    "replacement": lambda: DataLoader(
        Noisy(), 2, sampler=RandomSampler(Noisy(), replacement=True, generator=generator())
    ),
    "batch sampler": lambda: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy(), generator=generator()), 2, False)
    ),
    "stream": lambda: DataLoader(Stream(), 2),
    "plain": Shuffled,
}


def take(batches: Batches, epochs: int, stop: tuple[int, int] | None = None) -> list[str]:
    found = []
    while batches.epoch < epochs:
        for batch in batches:
            found.append(f"{batch} {float(torch.rand(()))}")  # the model draws too
            if (batches.epoch, batches.index) == stop:
                return found
    return found


@pytest.mark.parametrize("stop", [(0, 1), (1, 3), (1, 6)])
@pytest.mark.parametrize("kind", LOADERS)
def test_the_rest_of_the_epoch_comes(kind: str, stop: tuple[int, int]) -> None:
    def seeded() -> Batches:
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)
        return Batches(LOADERS[kind]())

    whole = take(seeded(), 3)
    cut = seeded()
    begun = take(cut, 3, stop)
    state, streams = cut.state_dict(), capture_randomness(cut.generators)
    torch.rand(9)
    again = Batches(LOADERS[kind]())
    again.load_state_dict(state)
    restore_randomness(streams, again.generators)
    assert begun + take(again, 3) == whole


def test_without_workers_what_was_done_is_not_read_again() -> None:
    first = Batches(DataLoader(Noisy(), 2, shuffle=True))
    take(first, 1, (0, 5))
    again = Batches(DataLoader(Noisy(), 2, shuffle=True))
    again.load_state_dict(first.state_dict())
    take(again, 1)
    assert again.loader.dataset.reads == 2


def test_data_that_became_shorter_is_told() -> None:
    first = Batches(list(range(5)))
    take(first, 1, (0, 4))
    again = Batches(list(range(3)))
    again.load_state_dict(first.state_dict())
    with pytest.raises(StateError, match="fewer batches than the 4 that were done"):
        take(again, 1)


def test_workers_that_outlive_an_epoch_are_refused() -> None:
    with pytest.raises(ConfigError, match="persistent_workers=True keeps random streams"):
        Batches(DataLoader(Noisy(), num_workers=1, persistent_workers=True))
