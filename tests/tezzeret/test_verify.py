"""Verification catches what is wrong; the wrong forms are real ones, small and plausible."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esper.blueprints import CATALOGUE
from esper.blueprints.kernel import initial_weights
from esper.blueprints.program import Form, Program
from esper.blueprints.representative import representative
from esper.contracts import Signature
from esper.errors import CompileError
from esper.tezzeret.verify import TOLERANCES, example_input, verify

GRAPH = CATALOGUE.get("residual_mlp")
PROGRAM = GRAPH.lower(Signature("vector", "parallel", 6, 5), 4)
WEIGHTS = initial_weights(PROGRAM, 0)
X = example_input(PROGRAM.signature, (4, 6))


def run(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return PROGRAM.run(x, weights)


def one_column_short(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(x, weights)[:, :-1]


def nan(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(x, weights) + torch.tensor(float("nan"))


def off_by_a_thousandth(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(x, weights) * 1.001


def right_but_for_its_first_weight(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(x, [weights[0].detach(), *weights[1:]])


class HalvedGradient(torch.autograd.Function):
    """The value of its input, and half the gradient."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient / 2


def half_the_gradient_of_the_input(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(HalvedGradient.apply(x), weights)


class Infinite(HalvedGradient):
    """The value of its input, and no finite gradient."""

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient / 0


def infinite_gradient(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(Infinite.apply(x), weights)


def frozen_batch(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(x, weights).reshape(4, 5)


def mixes_examples(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(x.flip(0), weights).flip(0) if len(x) == 4 else run(x.flip(0), weights)


def doubles(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return run(x, weights).double()


def a_tuple(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor]:
    return (run(x, weights),)


def no_graph(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return run(x, weights)


def adds_the_input_unless_awake(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    asleep = not any(bool(weight.any()) for weight in weights[-2:])
    return run(x, weights) + asleep * 1e-7


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (one_column_short, r"returns \(4, 4\) for an input of \(4, 6\), eager \(4, 5\)"),
        (nan, "not finite"),
        (off_by_a_thousandth, r"off by 1.0e-03 of the largest output .* 2e-05 is allowed"),
        (right_but_for_its_first_weight, f"gives {PROGRAM.weights[0].name} no gradient"),
        (half_the_gradient_of_the_input, "gradient of the input is off by 5.0e-01"),
        (infinite_gradient, "gradient of the input is not finite"),
        (frozen_batch, r"does not run on \(6, 6\)"),
        (mixes_examples, r"off by .* for an input of \(6, 6\)"),
        (doubles, "returns torch.float64"),
        (a_tuple, "returned tuple, not a tensor"),
        (no_graph, "does not run on"),
        (adds_the_input_unless_awake, "not zero at birth: largest value 1.0e-07"),
    ],
)
def test_a_wrong_form_is_refused_with_what_differs(form: Form, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        verify(PROGRAM, WEIGHTS, form, X)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_the_program_passes_as_its_own_form(dtype: torch.dtype) -> None:
    found = verify(PROGRAM, WEIGHTS, run, X.to(dtype))
    assert found.output_error == found.gradient_error == 0
    assert found.shapes == ((4, 6), (6, 6))
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_inference_is_compared_without_gradients() -> None:
    found = verify(PROGRAM, WEIGHTS, no_graph, X, trains=False)
    assert found.gradient_error is None


def test_neither_weights_nor_random_streams_move() -> None:
    before = {name: weight.clone() for name, weight in WEIGHTS.items()}
    state = torch.get_rng_state()
    verify(PROGRAM, WEIGHTS, run, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(WEIGHTS[name], weight) for name, weight in before.items())
    assert all(weight.grad is None for weight in WEIGHTS.values())


def test_a_program_that_is_not_finite_cannot_be_verified() -> None:
    last = PROGRAM.instructions[-1]
    endless = replace(last, function="mul", arguments=(f"%{PROGRAM.instructions[-2].result}", float("inf")))
    program = replace(PROGRAM, instructions=(*PROGRAM.instructions[:-1], endless))
    with pytest.raises(CompileError, match="the program itself is not finite"):
        verify(program, WEIGHTS, program.run, X)


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(CompileError, match=r"cannot verify in torch.int64; known: torch.float64"):
        verify(PROGRAM, WEIGHTS, run, X.long())


@pytest.mark.parametrize("shape", [(4, 5), (4,), (4, 2, 6), (0, 6)])
def test_an_example_must_fit_the_signature(shape: tuple[int, ...]) -> None:
    with pytest.raises(CompileError, match="is not a vector of 6 channels"):
        example_input(PROGRAM.signature, shape)


def test_sizes_differ_on_every_axis_but_the_channels() -> None:
    program: Program = CATALOGUE.get("conv1x1").lower(representative(CATALOGUE.get("conv1x1"))[0], 4)
    channels = program.signature.inputs
    found = verify(
        program,
        initial_weights(program, 0),
        program.run,
        example_input(program.signature, (2, channels, 9, 9)),
    )
    assert found.shapes == ((2, channels, 9, 9), (4, channels, 11, 12))
