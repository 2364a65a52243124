"""``Batches``: goes through a loader, and can go on in the middle of an epoch in another process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from esper.batches.share import Share
from esper.checkpoint.contents.private_api import next_index
from esper.checkpoint.contents.randomness import Generator, capture_randomness, restore_randomness
from esper.checkpoint.format.run_state import Position, Streams
from esper.errors import ConfigError, StateError

Batch = TypeVar("Batch")


class Batches(Generic[Batch]):
    """A loader that knows where it is.

    An epoch's order follows from the random streams as they were when it began, and so do the seeds of its
    workers. They are remembered; going on means to begin the epoch again from there, to pass over the batches
    that were done, and to put the streams back. With a ``DataLoader`` without workers the passed-over batches
    are not even read; workers read them again, because their own random streams advance with what they read.

    Args:
        loader: Iterable of batches, again and again. What it draws from, beyond the global streams and the
            generators of a ``DataLoader`` and its samplers, goes to ``generators``.
        generators: Random generators of the run's own, by name.

    Raises:
        ConfigError: The loader's workers live longer than an epoch: their random streams cannot be seen.

    Attributes:
        epoch: Epochs done.
        index: Batches of the present epoch that were handed out.
    """

    def __init__(self, loader: Iterable[Batch], generators: Mapping[str, Generator] | None = None) -> None:
        inner = loader.batches if isinstance(loader, Share) else loader
        if isinstance(inner, DataLoader) and inner.persistent_workers:
            raise ConfigError(
                "persistent_workers=True keeps random streams in the workers from epoch to epoch, which no "
                "checkpoint can see; leave it False"
            )
        self.loader = loader
        self.generators: dict[str, Generator] = {**own_generators(loader), **(generators or {})}
        self.epoch = self.index = 0
        self.began: Streams | None = None  # the streams when the present epoch began
        self.skip = 0

    def __iter__(self) -> Iterator[Batch]:
        """Hand out an epoch's batches, or what is left of it."""
        skip, self.skip = self.skip, 0
        if skip:
            assert self.began is not None
            now = capture_randomness(self.generators)
            restore_randomness(self.began, self.generators)
            iterator = self._passed(iter(self.loader), skip)
            restore_randomness(now, self.generators)
        else:
            self.began, self.index = capture_randomness(self.generators), 0
            iterator = iter(self.loader)
        for batch in iterator:
            self.index += 1
            yield batch
        self.epoch, self.index, self.began = self.epoch + 1, 0, None

    def _passed(self, iterator: Iterator[Batch], skip: int) -> Iterator[Batch]:
        loader = self.loader
        step: Callable[[], object] = iterator.__next__
        own = isinstance(loader, DataLoader) and not loader.num_workers
        if own and not isinstance(getattr(loader, "dataset", None), IterableDataset):
            step = next_index(iterator)  # the indices alone; a read costs what the epoch so far did
        try:
            for _ in range(skip):
                step()
        except StopIteration:
            raise StateError(
                f"the epoch has fewer batches than the {skip} that were done; the data is not what it was"
            ) from None
        return iterator

    def state_dict(self) -> Position:
        """Return the position, with the streams as they were when the epoch began."""
        return {"epoch": self.epoch, "index": self.index, "began": self.began, "length": self.length}

    @property
    def length(self) -> int | None:
        """Batches of an epoch, if the loader knows."""
        try:
            return len(self.loader) if isinstance(self.loader, Sized) else None
        except TypeError:  # a DataLoader over an iterable dataset has a __len__ that raises
            return None

    def load_state_dict(self, state: Position) -> None:
        """Go on there at the next ``iter``; an epoch under way in this object is given up."""
        self.epoch, self.index, self.began = state["epoch"], state["index"], state["began"]
        self.skip = self.index


def own_generators(loader: object) -> dict[str, Generator]:
    """Find the generators of a ``DataLoader`` and its samplers; one that is shared counts once."""
    found: dict[str, Generator] = {}
    loader = loader.batches if isinstance(loader, Share) else loader
    places: dict[str, object] = {"loader": loader}
    for name in ("sampler", "batch_sampler"):
        places[name] = getattr(loader, name, None)
    places["batch_sampler.sampler"] = getattr(places["batch_sampler"], "sampler", None)
    for name, place in places.items():
        generator = getattr(place, "generator", None)
        if isinstance(generator, random.SystemRandom):  # it has no state
            continue
        ours = isinstance(generator, torch.Generator | np.random.Generator | random.Random)
        if ours and not any(generator is known for known in found.values()):
            found[name] = generator
    return found
