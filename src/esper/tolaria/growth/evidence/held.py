"""Read the probe: so many examples, from all over it, the same at every reading.

A probe that is sorted, by class say, tells nothing of most classes in its first thousand examples. Where its
length is known, batches are taken from evenly spaced parts of it; a small probe is read whole, a shuffled
one and one without a length from its beginning.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from esper.batches.examples import count_examples, take
from esper.errors import ProbeError
from esper.kasmina.evidence.coupling import counted_rows

SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
SPREAD = 8  # times as many batches as are needed, some examples of each: one batch may hold one class
FAR = 16  # times as many batches as are needed: so far a probe is read through that can only be read in order
Numbered = tuple[int, object]  # a batch, and its place in the probe


def held_batches(
    probe: Iterable[object], most: int, seed: int, alone: bool
) -> tuple[list[Numbered], list[int]]:
    """Read batches until there are enough examples.

    Args:
        probe: Re-iterable.
        most: Examples.
        seed: Of the choice where there are more.
        alone: Whether examples count alone: then some of each of more batches are taken.

    Returns:
        The batches with their places in the probe, and the places of those left out: no target counts there.

    Raises:
        ProbeError: There is none.
    """
    batches, empty, count = list[Numbered](), list[int](), 0
    chosen = spread(probe, most, seed, alone)
    for index, batch in enumerate(probe) if chosen is None else chosen:
        if not len(counted_rows(batch)):
            empty.append(index)
            continue
        batches.append((index, batch))
        count += count_examples(batch)
        if chosen is None and count >= most:
            break
    if not batches and empty:
        raise ProbeError(
            "no target of the probe counts: all of them are -100, which torch's losses leave out"
        )
    if not batches:
        raise ProbeError("the probe gave no batch this time; it must be readable again and again")
    if chosen is not None and alone:
        batches = list(enumerate(thinned([batch for _, batch in batches], most, seed)))
    return batches, empty


def spread(probe: Iterable[object], most: int, seed: int, alone: bool) -> Iterable[Numbered] | None:
    """Return batches from all over a probe, with their places; None: read it from its beginning."""
    length = known_length(probe)
    if not length:
        return None
    needed = math.ceil(most / size_of_batches(probe))
    if needed >= length:
        return None
    count = min(length, most, SPREAD * needed) if alone else needed
    if isinstance(probe, Sequence):
        return [(index, probe[index]) for index in strata(length, count, seed)]
    if type(probe) is DataLoader and type(probe.batch_sampler) is BatchSampler:
        return enumerate(loader_of(probe, indices_of(probe.batch_sampler, most, count, seed, alone)))
    which = strata(min(length, FAR * needed), min(count, FAR * needed), seed)
    return read_through(probe, which)


def size_of_batches(probe: Iterable[object]) -> int:
    """Return how many examples a batch of a probe has, by what its loader says, or by the first."""
    if isinstance(probe, DataLoader) and probe.batch_size:
        return probe.batch_size  # to begin a loader starts its workers
    return max(count_examples(probe[0] if isinstance(probe, Sequence) else next(iter(probe))), 1)


def read_through(probe: Iterable[object], which: Sequence[int]) -> Iterator[Numbered]:
    """Give some batches of a probe that can only be read in order."""
    wanted = set(which)
    for index, batch in enumerate(probe):
        if index in wanted:
            yield index, batch
        if index >= which[-1]:
            return


def indices_of(batches: BatchSampler, most: int, count: int, seed: int, alone: bool) -> list[list[int]]:
    """Choose what a loader loads: examples where these count alone, else whole batches."""
    lists = list(batches)
    if not alone:
        return [lists[i] for i in strata(len(lists), count, seed)]
    flat = [index for one in lists for index in one]
    few = [flat[i] for i in strata(len(flat), min(most, len(flat)), seed)]
    return [few[i : i + batches.batch_size] for i in range(0, len(few), batches.batch_size)]


def known_length(probe: Iterable[object]) -> int:
    """Return how many batches a probe has that are not in random order; 0 where that is not known."""
    if isinstance(getattr(probe, "sampler", None), SHUFFLED):
        return 0
    if isinstance(getattr(probe, "dataset", None), IterableDataset):
        return 0
    try:
        return len(probe)  # pyrefly: ignore  # asked, not assumed
    except TypeError:
        return 0


def loader_of(loader: DataLoader[object], indices: list[list[int]]) -> DataLoader[object]:
    """Make a loader of some batches of another."""
    return DataLoader(
        loader.dataset,
        batch_sampler=indices,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def strata(length: int, count: int, seed: int) -> list[int]:
    """Choose places in rising order, one from each of so many even parts."""
    draw = random.Random(seed)
    edges = [i * length // count for i in range(count + 1)]
    return [draw.randrange(low, high) for low, high in itertools.pairwise(edges)]


def thinned(batches: Sequence[object], most: int, seed: int) -> list[object]:
    """Leave so many examples in all, from all over every batch; for examples that count alone."""
    counts = [count_examples(batch) for batch in batches]
    total = sum(counts)
    if total <= most:
        return list(batches)
    edges = [most * sum(counts[:i]) // total for i in range(len(counts) + 1)]
    shares = [high - low for low, high in itertools.pairwise(edges)]
    return [
        batch if share == count else take(batch, torch.tensor(strata(count, share, seed)))
        for batch, count, share in zip(batches, counts, shares, strict=True)
        if share
    ]


def refuse_not_finite(losses: Mapping[str, float]) -> None:
    """Refuse held-out batches of which a loss is not finite: with one of them nothing can be judged.

    Args:
        losses: Mean loss, by what the batch is called.

    Raises:
        ProbeError: With which, and what to do.
    """
    wrong = {name: loss for name, loss in losses.items() if not math.isfinite(loss)}
    if wrong:
        name, loss = next(iter(wrong.items()))
        others = f" ({len(wrong)} of {len(losses)} batches are like it)" if len(wrong) > 1 else ""
        raise ProbeError(
            f"the loss of {name} is {loss}{others}; held-out evidence needs finite losses: leave the batch "
            "out, or look for values in it, or in the model, that are not finite"
        )
