"""Is a compiled form the program it was made from? Nothing runs in a model before it is."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from esper.blueprints.program import Form, Program, Weight
from esper.contracts import Signature
from esper.errors import CompileError
from esper.tezzeret.pipelines import FAILURES

# Largest difference to eager, relative to the largest value; a few hundred roundings of each type.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
FLOOR = 1e-2  # gradients smaller than this share of the largest one are compared to that share

Gradients = Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class Verified:
    """What was compared, and how far apart it was; the form passed."""

    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    dtype: str
    device: str
    tolerance: float
    output_error: float  # largest, relative to the largest output
    gradient_error: float | None  # likewise over input and weights; None for inference
    milliseconds: float

    def to_dict(self) -> dict[str, object]:
        """Return it as JSON values."""
        return {**asdict(self), "shapes": [list(shape) for shape in self.shapes]}


def verify(
    program: Program, weights: Mapping[str, Tensor], form: Form, example: Tensor, *, trains: bool = True
) -> Verified:
    """Compare a form to the program, run one instruction after the other.

    Outputs, gradients of the input and of every weight are compared at two sizes that differ on every axis
    but the channels, with weights off their start, where all of them matter; then the form must be exactly
    zero with the outgoing weights at zero.

    Args:
        program: Program the form must equal.
        weights: Initial tensors, by name.
        form: Compiled form of the program.
        example: Input of the device, the dtype and the first size, batch first.
        trains: True to compare gradients too; otherwise everything runs under ``torch.no_grad``.

    Raises:
        CompileError: What differs, or what the form raised.
    """
    start = clock.perf_counter()
    device, dtype = example.device, example.dtype
    if dtype not in TOLERANCES:
        raise CompileError(f"cannot verify in {dtype}; known: {', '.join(map(str, TOLERANCES))}")
    source = torch.Generator().manual_seed(0)
    moved = [
        moved_weight(weight, weights[weight.name], source).to(device, dtype) for weight in program.weights
    ]
    inputs = [example.detach(), example_input(program.signature, larger(program, example), example)]
    output_errors: list[float] = []
    gradient_errors: list[float] = []
    for x in inputs:
        cotangent, expected, wanted = _expected(program, moved, x, source, trains)
        made, gradients = _run(form, x, moved, cotangent if trains else None)
        output_errors.append(_output_error(made, expected, x))
        if trains:
            gradient_errors.append(_gradient_error(program, gradients, wanted, TOLERANCES[dtype], x))
    at_birth = [
        torch.zeros_like(tensor) if weight.name in program.outgoing else tensor
        for weight, tensor in zip(program.weights, moved, strict=True)
    ]
    made, _ = _run(form, inputs[0], at_birth, None)
    if bool(made.any()):
        raise CompileError(
            f"the form is not zero at birth: largest value {float(made.abs().max()):.1e} with "
            f"{', '.join(program.outgoing)} at zero"
        )
    return Verified(
        shapes=tuple(tuple(x.shape) for x in inputs),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        tolerance=TOLERANCES[dtype],
        output_error=max(output_errors),
        gradient_error=max(gradient_errors) if trains else None,
        milliseconds=(clock.perf_counter() - start) * 1e3,
    )


def moved_weight(weight: Weight, initial: Tensor, source: torch.Generator) -> Tensor:
    """Return a weight off its start by up to 1/√fan_in (a tenth for vectors), so that nothing cancels out."""
    fan_in = math.prod(weight.shape[1:]) if len(weight.shape) > 1 else 100
    noise = torch.rand(weight.shape, generator=source) * 2 - 1
    return initial.detach().cpu() + noise / math.sqrt(max(fan_in, 1))


def example_input(signature: Signature, shape: Sequence[int], like: Tensor | None = None) -> Tensor:
    """Return an input drawn from its own random stream, the same for the same shape.

    Raises:
        CompileError: The shape is not one of this signature.
    """
    axes = {"vector": 2, "sequence": 3, "image": 4}[signature.layout]
    channels = 1 if signature.layout == "image" else axes - 1
    if len(shape) != axes or min(shape) < 1 or shape[channels] != signature.inputs:
        raise CompileError(
            f"an example of shape {tuple(shape)} is not a {signature.layout} of {signature.inputs} channels"
        )
    drawn = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(sum(shape)))
    return drawn if like is None else drawn.to(like.device, like.dtype)


def larger(program: Program, example: Tensor) -> tuple[int, ...]:
    """Return a size that differs from the example's on every axis but the channels."""
    channels = 1 if program.signature.layout == "image" else example.dim() - 1
    more = [2, *range(1, example.dim())]  # height and width by different amounts
    more[channels] = 0
    return tuple(size + add for size, add in zip(example.shape, more, strict=True))  # batch first


def _expected(
    program: Program, weights: Sequence[Tensor], x: Tensor, source: torch.Generator, trains: bool
) -> tuple[Tensor, Tensor, Gradients]:
    """Run the program; return a random cotangent, its output and its gradients."""
    try:
        made, _ = _run(program.run, x, weights, None)
        cotangent = torch.randn(made.shape, generator=source).to(made.device, made.dtype)
        output, gradients = _run(program.run, x, weights, cotangent if trains else None)
    except CompileError as error:
        raise CompileError(f"the program itself does not run: {error}") from error
    found = [output, *(gradient for gradient in gradients if gradient is not None)]
    if not all(bool(tensor.isfinite().all()) for tensor in found):
        raise CompileError(
            f"the program itself is not finite at {tuple(x.shape)}; no form of it can be checked"
        )
    return cotangent, output, gradients


def _run(
    form: Form, x: Tensor, weights: Sequence[Tensor], cotangent: Tensor | None
) -> tuple[Tensor, Gradients]:
    """Run a form on copies; with a cotangent also return gradients of the input and of the weights."""
    trains = cotangent is not None
    leaves = [tensor.detach().clone().requires_grad_(trains) for tensor in (x, *weights)]
    try:
        with torch.set_grad_enabled(trains):
            output = form(leaves[0], leaves[1:])
            if not isinstance(output, Tensor):
                raise CompileError(f"the form returned {type(output).__name__}, not a tensor")
            if cotangent is None:
                return output, ()
            if output.shape != cotangent.shape:
                return output.detach(), ()  # the caller says so
            return output.detach(), torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    except FAILURES as error:
        raise CompileError(f"the form does not run on {tuple(x.shape)}: {error}") from error


def _output_error(made: Tensor, expected: Tensor, x: Tensor) -> float:
    where = f"for an input of {tuple(x.shape)}"
    if made.shape != expected.shape:
        raise CompileError(f"the form returns {tuple(made.shape)} {where}, eager {tuple(expected.shape)}")
    if made.dtype != expected.dtype or made.device != expected.device:
        raise CompileError(
            f"the form returns {made.dtype} on {made.device} {where}, "
            f"eager {expected.dtype} on {expected.device}"
        )
    if not bool(made.isfinite().all()):
        raise CompileError(f"the form is not finite {where}; eager is")
    error = _relative(made, expected, 0.0)
    if error > TOLERANCES[x.dtype]:
        raise CompileError(
            f"the form is off by {error:.1e} of the largest output {where}; "
            f"{TOLERANCES[x.dtype]:.0e} is allowed"
        )
    return error


def _gradient_error(
    program: Program, made: Gradients, wanted: Gradients, tolerance: float, x: Tensor
) -> float:
    names = ["the input", *(weight.name for weight in program.weights)]
    largest = max((float(one.abs().max()) for one in wanted if one is not None), default=0.0)
    worst = 0.0
    for name, mine, theirs in zip(names, made, wanted, strict=True):
        if theirs is None and mine is None:
            continue
        if mine is None:
            raise CompileError(f"the form gives {name} no gradient; eager does")
        reference = torch.zeros_like(mine) if theirs is None else theirs
        if not bool(mine.isfinite().all()):
            raise CompileError(f"the form's gradient of {name} is not finite; eager's is")
        error = _relative(mine, reference, FLOOR * largest)
        if error > tolerance:
            raise CompileError(
                f"the form's gradient of {name} is off by {error:.1e} of its largest value for an input of "
                f"{tuple(x.shape)}; {tolerance:.0e} is allowed"
            )
        worst = max(worst, error)
    return worst


def _relative(made: Tensor, expected: Tensor, floor: float) -> float:
    if not made.numel():
        return 0.0
    difference = float((made.double() - expected.double()).abs().max())
    scale = max(float(expected.abs().max()), floor)
    return difference / scale if scale else difference
