"""TorchScript: the program printed as source and compiled in milliseconds; trains; deprecated by torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from esper.blueprints.program import Argument, Form, Program
from esper.errors import CompileError
from esper.tezzeret.pipelines import FAILURES, Pipeline, require
from esper.tezzeret.quiet import quiet

__all__ = ["PIPELINE"]

WORD = re.compile(r"[A-Za-z_]\w*")


class TorchScript:
    """Prints programs as TorchScript.

    Nothing is traced and no Python runs: torch's own parser reads a text in which only ``torch.ops.aten``
    functions of the program's whitelist can stand. The profiling executor keeps torch's defaults, which are
    process-wide: per set of requires_grad flags it watches the first call, optimises on the second (2–30 ms
    each), and takes other shapes without compiling again (measured: 0.13 ms for a new batch size, as for the
    old). Verification makes both calls, so a form that reaches training is past them.
    """

    name = "torchscript"
    trains = True
    background_only = False

    def unavailable(self) -> str | None:
        """Say that this torch no longer has TorchScript, or None."""
        script = getattr(torch, "jit", None)
        if getattr(script, "CompilationUnit", None) is None:
            return f"torch {torch.__version__} has no torch.jit.CompilationUnit"
        return None

    def compile(self, program: Program, example: Tensor) -> Form:
        """Print and parse.

        Raises:
            CompileError: This torch has no TorchScript, or it refuses the text.
        """
        require(self)
        text = source(program)
        try:
            with quiet():
                return torch.jit.CompilationUnit(text).kernel
        except FAILURES as error:
            raise CompileError(f"TorchScript refuses the program: {error}") from error

    def dump(self, form: Form) -> bytes | None:
        """Return None: printing and parsing again takes 1 ms, reading an archive 3 ms."""
        return None

    def load(self, stored: bytes, program: Program) -> Form:
        """Compile the program again; stored bytes are not read."""
        return self.compile(program, torch.empty(0))


def source(program: Program) -> str:
    """Print a program as TorchScript; results are numbered, so no name of a graph reaches the text.

    Raises:
        CompileError: A constant cannot be printed.
    """
    places = {"%x": "x"} | {f"@{weight.name}": f"w[{i}]" for i, weight in enumerate(program.weights)}
    lines = ["def kernel(x: Tensor, w: List[Tensor]) -> Tensor:"]
    try:
        for number, one in enumerate(program.instructions):
            given = ", ".join(_printed(argument, places) for argument in one.arguments)
            lines.append(f"    v{number} = torch.ops.aten.{one.function}({given})")
            places[f"%{one.result}"] = f"v{number}"
        lines.append(f"    return {places[program.result]}")
    except KeyError as error:
        raise CompileError(f"the program reads {error}, which nothing made before") from error
    return "\n".join([*lines, ""])


def _printed(argument: Argument, places: dict[str, str]) -> str:
    match argument:
        case None | bool() | int():
            return repr(argument)
        case float():
            return f'float("{argument!r}")'  # inf and nan have no literal
        case str() if argument[:1] in ("%", "@"):
            return places[argument]
        case str() if WORD.fullmatch(argument):
            return f'"{argument}"'
        case ():
            return "torch.jit.annotate(List[int], [])"
        case tuple() if isinstance(argument[0], str):
            return _listed([places[str(name)] for name in argument])
        case tuple():
            return _listed([repr(int(number)) for number in argument])
        case _:
            raise CompileError(f"TorchScript has no way to write the constant {argument!r}")


def _listed(parts: Sequence[str]) -> str:
    return f"[{', '.join(parts)}]"


PIPELINE: Pipeline = TorchScript()
