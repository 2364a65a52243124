"""Joins batches, where the model runs on joined ones."""

from __future__ import annotations

from collections.abc import Sequence

from esper.batches.examples import join
from esper.batches.layout import Batch


class Joins:
    """Joins batches of one run.

    Attributes:
        apart: True where they stay apart, because the loss couples examples, or a pass over joined ones has
            failed: a graph whose adjacency belongs to its own nodes, say.
    """

    def __init__(self, apart: bool = False) -> None:
        self.apart = apart

    def __call__(self, batches: Sequence[Batch]) -> list[Batch]:
        """Return the batches, joined if they can be."""
        return list(batches) if self.apart else join(batches)
