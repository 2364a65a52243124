"""No compilation: the program's instructions, one by one. The measure of all others."""

from __future__ import annotations

from torch import Tensor

from esper.blueprints.program import Form, Program
from esper.tezzeret.pipelines import Pipeline

__all__ = ["PIPELINE"]


class Eager:
    """Runs programs as they are."""

    name = "eager"
    trains = True
    background_only = False

    def unavailable(self) -> str | None:
        """Return None: it always can."""
        return None

    def compile(self, program: Program, example: Tensor) -> Form:
        """Return the program's own run."""
        return program.run

    def dump(self, form: Form) -> bytes | None:
        """Return None: there is nothing to store."""
        return None

    def load(self, stored: bytes, program: Program) -> Form:
        """Return the program's own run."""
        return program.run


PIPELINE: Pipeline = Eager()
