"""Pipelines: how a program becomes something faster. The file's name is the pipeline's name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from esper.blueprints.program import Form, Program
from esper.errors import CompileError
from esper.registry import Registry

# What torch raises when it cannot compile; its own compiler errors are RuntimeErrors.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OSError)


class Pipeline(Protocol):
    """Compiles programs.

    A form is a pure function of the input and the list of weights: it holds no weights of its own, so one
    form serves every kernel of the same program, and swapping it never touches an optimizer.

    Attributes:
        name: The file's.
        trains: Gradients reach the input and every weight.
        background_only: Compiling takes seconds, so it never runs on the training thread.
    """

    name: str
    trains: bool
    background_only: bool

    def unavailable(self) -> str | None:
        """Return why it cannot run in this process, or None."""

    def compile(self, program: Program, example: Tensor) -> Form:
        """Compile.

        Args:
            program: Program to compile.
            example: Input of the device and dtype to compile for, at a typical size, batch first; only
                the channels are fixed.

        Raises:
            CompileError: Torch could not, or would freeze the batch at the example's size.
        """

    def dump(self, form: Form) -> bytes | None:
        """Return the form as bytes, or None where compiling again is as good as reading."""

    def load(self, stored: bytes, program: Program) -> Form:
        """Return the form that ``dump`` stored.

        The bytes may hold native code and pickles. Call it only with bytes whose digest and signature have
        been checked; nothing here can tell good from bad.

        Raises:
            CompileError: They do not load.
        """


def require(pipeline: Pipeline) -> None:
    """Refuse to compile where a pipeline cannot run.

    Raises:
        CompileError: With the reason.
    """
    if reason := pipeline.unavailable():
        raise CompileError(f"{pipeline.name} is unavailable: {reason}")


PIPELINES: Registry[Pipeline] = Registry("esper.tezzeret.pipelines", "esper.pipelines")
