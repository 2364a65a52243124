"""What is one value of held-out evidence: an example where each counts alone, else a block of them.

A loss that couples examples, by negatives in the batch, statistics of it or weights that are divided by their
sum, says something else of a batch of one. It is judged on blocks of the size the loop uses it with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.batches.examples import LossFunction, count_examples, join, take
from esper.batches.layout import Batch
from esper.errors import ProbeError
from esper.kasmina.evidence.coupling import ASKED, counted_rows, independent
from esper.kasmina.race.schedule import first
from esper.kasmina.widths.places import Place

FEW = 64  # examples of a batch that are asked


@dataclass(frozen=True)
class Worth:
    """How the loss of held-out batches becomes values.

    Attributes:
        alone: Whether every example is a value; else every batch or block of one is.
        cut: Whether batches can be cut and joined to blocks of another size.
        per_example: Gives the losses of examples, (examples,), where the user has said how.
        told: Whether that has been seen; batches are values where it cannot be, as at experts of some rows.
        why: Why batches are never cut, where the loss of a part of one could not be taken.
    """

    alone: bool
    cut: bool = False
    per_example: Callable[[nn.Module, Any], Tensor] | None = None
    why: str = ""
    told: bool = True

    @property
    def named(self) -> str:
        """What the values are, in the plural."""
        if self.alone:
            return "held-out examples"
        if self.told:
            return "held-out batches, whose examples the loss couples,"
        return "held-out batches, for it cannot be told whether the loss couples examples (per_example=),"


ALONE_EACH = Worth(alone=True)


def worth_of(
    model: nn.Module, loss_fn: LossFunction, places: Mapping[str, Place], held: Sequence[Batch]
) -> Worth:
    """Find out what is one value of evidence: nobody takes an example for one unless it is shown.

    Args:
        model: The host, left as it is.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        places: Places where gradients are looked at, by name.
        held: Batches of the probe.
    """
    why = ""
    for batch in held[:ASKED]:
        try:
            answer = independent(model, lambda b: loss_fn(model, b), places, first(batch, FEW), exactly=True)
        except ProbeError as error:  # it takes no part of a batch: a graph, whose adjacency is of its nodes
            answer, why = False, str(error)
        if answer is not None:
            return Worth(alone=answer, cut=not why, why=why)
    return Worth(alone=False, cut=True, told=False)


def counted(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Leave out the rows that torch's losses ignore, and batches of nothing else."""
    for batch in batches:
        rows = counted_rows(batch)
        if len(rows) == count_examples(batch):
            yield batch
        elif len(rows):
            yield take(batch, rows)


def blocks(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """Cut batches that are twice as large, and join those that are half as large or less.

    Args:
        batches: Batches whose examples the loss couples.
        size: Examples of a block. What is left of a batch, or at the end, is left out: its loss is another.
    """
    waiting, count = list[Batch](), 0
    for batch in batches:
        examples = count_examples(batch)
        if examples >= 2 * size:
            for part in range(examples // size):
                yield take(batch, torch.arange(part * size, (part + 1) * size))
        elif 2 * examples > size:
            yield batch
        else:
            waiting.append(batch)
            count += examples
        if count >= size:
            yield from join(waiting)
            waiting, count = list[Batch](), 0
