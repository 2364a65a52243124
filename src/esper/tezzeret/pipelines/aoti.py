"""AOTInductor: native code in a file, for inference only; fossilised and deployed kernels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, aoti_load_package

from esper.blueprints.program import Form, Program
from esper.errors import CompileError
from esper.tezzeret.pipelines import FAILURES, Pipeline, require
from esper.tezzeret.quiet import quiet
from esper.tezzeret.toolchain import native_compiler
from esper.tezzeret.tracing import exported

__all__ = ["PIPELINE"]


class NativeForm:
    """A loaded package; ``stored`` is the package itself."""

    def __init__(self, stored: bytes) -> None:
        self.stored = stored
        self.run = aoti_load_package(io.BytesIO(stored))

    def __call__(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Run the native code.

        Raises:
            CompileError: A gradient would be needed; the code has none, and would return a constant.
        """
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
            raise CompileError("aoti is for inference only; run it under torch.no_grad(), or use export")
        return self.run(x, list(weights))


class Aoti:
    """Compiles programs to a package of native code; loading one needs no compiler."""

    name = "aoti"
    trains = False
    background_only = True

    def unavailable(self) -> str | None:
        """Say that there is no C++ compiler, or None."""
        return native_compiler()

    def compile(self, program: Program, example: Tensor) -> Form:
        """Export, compile and package.

        Raises:
            CompileError: There is no compiler, or it refuses the program.
        """
        require(self)
        traced = exported(program, example, free=True)
        with TemporaryDirectory(prefix="esper-aoti-") as folder:
            package = Path(folder, "kernel.pt2")
            try:
                with quiet(), torch.no_grad():
                    aoti_compile_and_package(traced, package_path=str(package))
            except FAILURES as error:
                raise CompileError(f"AOTInductor refuses the program: {error}") from error
            return self.load(package.read_bytes(), program)

    def dump(self, form: Form) -> bytes | None:
        """Return the package, 1–2 MB, good for this torch, device and instruction set only."""
        assert isinstance(form, NativeForm)
        return form.stored

    def load(self, stored: bytes, program: Program) -> Form:
        """Load a package.

        SECURITY: this is native code and runs with the process's rights. The caller has checked digest,
        signature and toolchain before.

        Raises:
            CompileError: It does not load.
        """
        try:
            with quiet():
                return NativeForm(stored)
        except FAILURES as error:
            raise CompileError(f"the stored package does not load: {error}") from error


PIPELINE: Pipeline = Aoti()
