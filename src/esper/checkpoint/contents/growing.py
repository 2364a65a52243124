"""What a checkpoint asks of a run that grows, so that checkpoints need to know nothing of how it grows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn

from esper.config import Config
from esper.contracts import Event
from esper.distributed.model_wrapper import Wrapping
from esper.saving.genome import Plan


class Journalled(Protocol):
    """The journal a run writes, as far as a checkpoint goes."""

    run: str | None  # its id

    def take_back(self) -> None:
        """Remove what this process has begun, where nothing came of it."""


class Growing(Protocol):
    """A run that grows; :class:`esper.Growth` is one."""

    @property
    def config(self) -> Config:
        """Its settings."""

    @property
    def steps(self) -> int:
        """Optimizer steps acted on."""

    @property
    def host(self) -> nn.Module:
        """The model whose layers grow."""

    @property
    def wrapping(self) -> Wrapping:
        """What stands around it."""

    @property
    def plans(self) -> Sequence[Plan]:
        """Everything that grew and changed the model's shape, in order."""

    @property
    def journal(self) -> Journalled | None:
        """What this process journals to, where it does."""

    def observe(self, event: Event) -> None:
        """Take an event of the checkpoints'."""

    def awake(self) -> list[dict[str, object]]:
        """List the seeds that are not dormant: stage, α, evidence."""

    def gates(self) -> dict[str, int]:
        """Count the looks at held-out evidence, and what was kept after them."""

    def state_dict(self) -> Mapping[str, object]:
        """Return everything but the model's and the optimizers' own state."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Grow a fresh model as the saved one had grown; the shapes fit afterwards."""
