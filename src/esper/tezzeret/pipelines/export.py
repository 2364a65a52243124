"""torch.export: an ahead-of-time graph of core operations; trains, and is stored as a small ``.pt2``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from zipfile import BadZipFile

import torch
from torch import Tensor
from torch.export import ExportedProgram

from esper.blueprints.program import Form, Program
from esper.errors import CompileError
from esper.tezzeret.pipelines import FAILURES, Pipeline
from esper.tezzeret.quiet import quiet
from esper.tezzeret.tracing import exported, flat

__all__ = ["PIPELINE"]


class ExportedForm:
    """An exported graph that runs, with what it was made from."""

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.run = flat(program)

    def __call__(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Run the graph."""
        return self.run(x, *weights)[0]


class Export:
    """Exports programs."""

    name = "export"
    trains = True
    background_only = False

    def unavailable(self) -> str | None:
        """Return None: every torch this package accepts has it."""
        return None

    def compile(self, program: Program, example: Tensor) -> Form:
        """Trace the program at the example's size; the graph runs at any, which verification checks.

        Raises:
            CompileError: The exporter refuses it.
        """
        traced = exported(program, example, free=False)
        traced.example_inputs = None  # or the stored form would carry a pickle of the example's tensors
        return ExportedForm(traced)

    def dump(self, form: Form) -> bytes | None:
        """Return the bytes of a ``.pt2``; it holds a graph and no weights."""
        assert isinstance(form, ExportedForm)
        stored = io.BytesIO()
        with quiet():
            torch.export.save(form.program, stored)
        return stored.getvalue()

    def load(self, stored: bytes, program: Program) -> Form:
        """Read a ``.pt2``.

        SECURITY: torch reads parts of such a file by unpickling, which runs whatever it says. The caller has
        checked digest and signature before.

        Raises:
            CompileError: It does not load.
        """
        try:
            with quiet():
                return ExportedForm(torch.export.load(io.BytesIO(stored)))
        except (*FAILURES, BadZipFile) as error:
            raise CompileError(f"the stored export does not load: {error}") from error


PIPELINE: Pipeline = Export()
