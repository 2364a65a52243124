"""Who must act when a seed moves or the model has changed its shape: the governor, where there is one."""

from __future__ import annotations

from typing import Protocol

from esper.contracts import Stage


class Guard(Protocol):
    """What is called at these moments; it is not told of them as of events, for it changes the run."""

    def moved(self, site: str, target: Stage, step: int) -> None:
        """Act on a seed's move, right after it."""

    def reshaped(self) -> None:
        """Forget what was kept of the model's earlier shapes."""

    def expect(self, step: int, why: str, steps: int | None = None) -> None:
        """Expect a discontinuity for so many steps, or as many as the settings say."""


class Unguarded:
    """Nobody acts."""

    def moved(self, site: str, target: Stage, step: int) -> None:
        """Do nothing."""

    def reshaped(self) -> None:
        """Do nothing."""

    def expect(self, step: int, why: str, steps: int | None = None) -> None:
        """Do nothing."""
