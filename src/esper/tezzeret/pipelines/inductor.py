"""Inductor: torch.compile over the exported graph; seconds to compile, so only in the background."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._inductor import config

from esper.blueprints.program import Form, Program
from esper.errors import CompileError
from esper.tezzeret.pipelines import FAILURES, Pipeline, require
from esper.tezzeret.quiet import quiet
from esper.tezzeret.toolchain import native_compiler
from esper.tezzeret.tracing import example_weights, exported, flat

__all__ = ["PIPELINE"]


class Inductor:
    """Compiles programs to native code, forward and backward.

    Torch cannot store such a form. A worker that compiles the same program fills Inductor's cache on disk
    (``TORCHINDUCTOR_CACHE_DIR``), and the training process then needs about 1.5 s instead of 10–20 s.
    """

    name = "inductor"
    trains = True
    background_only = True

    def unavailable(self) -> str | None:
        """Say that there is no C++ compiler, or None."""
        return native_compiler()

    def compile(self, program: Program, example: Tensor) -> Form:
        """Compile, and run once with and once without gradients, so that no later call pays.

        Raises:
            CompileError: There is no compiler, or it refuses the program.
        """
        require(self)
        graph = flat(exported(program, example, free=True))
        with quiet():
            run = torch.compile(graph, dynamic=True, fullgraph=True)

        def form(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
            return run(x, *weights)[0]

        weights = example_weights(program, example)
        try:
            # A pool of compile workers would outlive the kernel and its worker's limits.
            with quiet(), config.patch(compile_threads=1):
                form(example.detach().requires_grad_(), weights).sum().backward()
                form(example.detach(), weights).sum().backward()
                with torch.no_grad():
                    form(example, weights)
        except FAILURES as error:
            raise CompileError(f"Inductor refuses the program: {error}") from error
        return form

    def dump(self, form: Form) -> bytes | None:
        """Return None: torch cannot store it in a way that spares the compiler."""
        return None

    def load(self, stored: bytes, program: Program) -> Form:
        """Refuse: nothing is ever stored.

        Raises:
            CompileError: Always.
        """
        raise CompileError("an inductor form is not stored; compile the program again")


PIPELINE: Pipeline = Inductor()
