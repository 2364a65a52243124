"""``nan_batch``: one batch of the training data holds NaN."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from esper.chaos.child import Child
from esper.chaos.fault import GOVERNED, Fault, Seen, Verdict

__all__ = ["NanBatch"]


class NanBatch(Fault):
    """Poisons the batch of one step; the governor must undo what it did."""

    about = "a batch of NaN out of the data loader"
    growth: Mapping[str, object] = GOVERNED
    different = "the governor undid steps"

    def arm(self, child: Child) -> None:
        """Put a loader around the loader."""
        batches = child.armed.batches
        assert batches is not None
        batches.loader = PoisonedLoader(batches.loader, child)

    def judge(self, seen: Seen) -> Verdict:
        """Judge by the governor's own events."""
        return undone(seen)


class PoisonedLoader:
    """Hands out a loader's batches, and one of them full of NaN.

    Args:
        loader: Loader of the run's own.
        child: Process of the run; its spec says at which step.
    """

    def __init__(self, loader: Iterable[object], child: Child) -> None:
        self.loader, self.child = loader, child

    def __iter__(self) -> Iterator[object]:
        """Go through the loader once."""
        for batch in self.loader:
            due = not self.child.struck and self.child.step >= self.child.spec.at
            spoiled = poisoned(batch) if due else batch
            if spoiled is not batch:
                self.child.strike("NaN in a batch")
            yield spoiled


def poisoned(batch: object) -> object:
    """Return a copy of a batch in which every floating number is NaN; the batch itself where it has none."""
    if isinstance(batch, Tensor):
        return torch.full_like(batch, torch.nan) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        found = {key: poisoned(value) for key, value in batch.items()}
        return batch if all(found[key] is batch[key] for key in batch) else found
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        parts = [poisoned(value) for value in batch]
        return batch if all(new is old for new, old in zip(parts, batch, strict=True)) else parts
    return batch


def undone(seen: Seen) -> Verdict:
    """Say what the governor did about it."""
    ways, alarms = seen.events("rolled_back"), seen.events("alarm")
    told = [f"{mark['data']['signal']} {mark['data']['alarm']}: {mark['data']['action']}" for mark in alarms]
    told += [f"rolled back to step {mark['data']['to']}" for mark in ways]
    return Verdict(bool(ways), "; ".join(told) or "the governor saw nothing")
