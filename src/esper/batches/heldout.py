"""Held-out batches as growth can read them, where the user's are of inference mode or of one example."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from typing import cast

import torch
from torch import Tensor

from esper.batches.examples import count_examples, join
from esper.batches.layout import Batch, flatten, unflatten
from esper.errors import EsperError, ProbeError
from esper.surgery.isolation.contexts import same_generators, same_randomness

BUNDLE = 64  # batches of one example that are read as one

Change = Callable[[Iterator[Batch]], Iterable[Batch]]


class HeldOut:
    """A probe whose batches are changed on the way; it can be read again and again, as the user's own.

    Args:
        probe: The user's held-out batches, re-iterable.
        change: Function of an iteration over it.
    """

    def __init__(self, probe: Iterable[Batch], change: Change) -> None:
        self.given, self.change = probe, change

    def __iter__(self) -> Iterator[Batch]:
        """Read it from the start."""
        return iter(self.change(iter(self.given)))

    def __getattr__(self, name: str) -> object:
        """Show the samplers and generators of a loader."""
        if name in {"given", "change"}:
            raise AttributeError(name)
        return getattr(self.given, name)


class Turned(HeldOut):
    """A probe of which every batch is changed by itself; it is as long as the user's own.

    Args:
        probe: The user's held-out batches, re-iterable.
        change: Function of a batch.
    """

    def __init__(self, probe: Iterable[Batch], change: Callable[[Batch], Batch]) -> None:
        super().__init__(probe, partial(map, change))

    def __len__(self) -> int:
        """Count the batches, if the probe knows."""
        return len(cast("Sized", self.given))


def differentiable(probe: Iterable[Batch]) -> Iterable[Batch]:
    """Return the probe, on copies of tensors that were made in inference mode: these take no gradient."""
    batch = next(iter(first(probe, 1)), None)
    if not any(isinstance(leaf, Tensor) and leaf.is_inference() for leaf in flatten(batch)[0]):
        return probe
    return Turned(probe, copied)


def copied(batch: Batch) -> Batch:
    """Copy the tensors of a batch that were made in inference mode."""
    leaves, nest = flatten(batch)
    with torch.inference_mode(False):
        own = [leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf for leaf in leaves]
    return unflatten(own, nest)


def bundled(probe: Iterable[Batch]) -> Iterable[Batch] | None:
    """Return a probe of single examples, several to a batch; None where it is none."""
    try:
        some = first(probe, 2)
        alone = [count_examples(batch) for batch in some] == [1, 1] and len(join(some)) == 1
    except (EsperError, RuntimeError):  # nothing that could be joined
        return None
    return HeldOut(probe, bundles) if alone else None


def bundles(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Join batches, so many at a time."""
    while some := list(itertools.islice(batches, BUNDLE)):
        yield from join(some)


def first(probe: Iterable[Batch], count: int) -> list[Batch]:
    """Return the first batches of a probe; no random stream is moved.

    Raises:
        ProbeError: It cannot be read.
    """
    with same_randomness(), same_generators(probe):
        try:
            return list(itertools.islice(iter(probe), count))
        except EsperError:
            raise
        except Exception as error:  # the user's data set is read here
            raise ProbeError(f"the probe cannot be read: {type(error).__name__}: {error}") from error
