"""Programs as exported graphs: what export stores, and what Inductor and AOTInductor compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from esper.blueprints.kernel import initial_weights
from esper.blueprints.program import Program
from esper.errors import CompileError
from esper.tezzeret.pipelines import FAILURES
from esper.tezzeret.quiet import quiet


class Traced(nn.Module):
    """A program as the module the exporter asks for; weights are inputs, so that none is baked in."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor, weights: list[Tensor]) -> Tensor:
        """Run the program."""
        return self.program.run(x, weights)


def example_weights(program: Program, example: Tensor) -> list[Tensor]:
    """Return weights of the right shapes, on the example's device in its dtype, that want gradients."""
    drawn = initial_weights(program, seed=0).values()
    return [weight.to(example.device, example.dtype).requires_grad_() for weight in drawn]


def exported(program: Program, example: Tensor, free: bool) -> ExportedProgram:
    """Trace a program.

    Args:
        program: Straight line of calls; its constants follow from the signature, so no size of the example
            enters the graph.
        example: Input to trace with, batch first.
        free: True to prove it also to whoever compiles the graph: the batch is a symbol, and time, height and
            width where the exporter can keep them. Costs 75–290 ms instead of 20–40.

    Raises:
        CompileError: The exporter refuses the program, or must fix the batch at the example's.
    """
    example = example if len(example) > 1 else torch.cat([example, example])  # a size of 1 is taken as fixed
    channels = 1 if program.signature.layout == "image" else example.dim() - 1
    sizes = {axis: Dim.AUTO for axis in range(1, example.dim()) if axis != channels}
    shapes = ({0: Dim.DYNAMIC, **sizes}, [None] * len(program.weights)) if free else None
    inputs = (example.detach(), example_weights(program, example))
    try:
        with quiet():
            return torch.export.export(Traced(program), inputs, dynamic_shapes=shapes, strict=False)
    except FAILURES as error:
        wanted = " with a free batch" if free else ""
        raise CompileError(f"torch.export refuses the program{wanted}: {error}") from error


def flat(program: ExportedProgram) -> Callable[..., tuple[Tensor]]:
    """Return the graph as a function ``(x, *weights) -> (output,)``.

    Guards, hooks and the flattening of argument trees are left out: they cost 10–50 µs a call, and
    verification has already run the form at two sizes.
    """
    with quiet():
        module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    module.graph.set_codegen(fx.graph.CodeGen())
    module.recompile()
    return module.forward
