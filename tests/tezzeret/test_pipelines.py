"""Every pipeline against eager, for the whole catalogue; quiet, stored and loaded, honest about absence."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esper.blueprints import CATALOGUE
from esper.blueprints.kernel import GraphKernel, initial_weights
from esper.blueprints.program import Instruction, Program
from esper.blueprints.representative import representative
from esper.blueprints.sizes import example_shapes
from esper.contracts import Signature
from esper.errors import CompileError, RegistryError
from esper.tezzeret.build import pipeline
from esper.tezzeret.pipelines import PIPELINES, Pipeline
from esper.tezzeret.pipelines.torchscript import source
from esper.tezzeret.toolchain import native_compiler, toolchain
from esper.tezzeret.verify import example_input, moved_weight, verify

SLOW = {name for name in PIPELINES.names() if pipeline(name).background_only}
QUICK = [name for name in PIPELINES.names() if name not in SLOW and pipeline(name).trains]
NATIVE = pytest.mark.skipif(native_compiler() is not None, reason=str(native_compiler()))


def lowered(name: str, place: int = 0) -> Program:
    graph = CATALOGUE.get(name)
    return graph.lower(representative(graph)[place], 6)


def example(program: Program) -> Tensor:
    return example_input(program.signature, example_shapes(program.signature)[0][0])


def awake(program: Program, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Weights off their start, the outgoing ones included."""
    stream = torch.Generator().manual_seed(1)
    start = initial_weights(program, 0)
    moved = [moved_weight(weight, start[weight.name], stream) for weight in program.weights]
    return [tensor.to(dtype).requires_grad_() for tensor in moved]


def gradients(form, x: Tensor, weights: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(form(x, weights).square().sum(), weights)


def test_a_pipeline_is_called_like_its_file() -> None:
    assert {name: pipeline(name).name for name in PIPELINES.names()} == {n: n for n in PIPELINES.names()}
    assert {"aoti", "inductor"} <= SLOW
    assert {"eager", "export", "torchscript"} <= set(QUICK)
    assert not pipeline("aoti").trains
    with pytest.raises(RegistryError, match="did you mean 'export'"):
        pipeline("exports")


@pytest.mark.parametrize("blueprint", CATALOGUE.names())
@pytest.mark.parametrize("name", QUICK)
def test_a_form_is_its_program(name: str, blueprint: str) -> None:
    """Outputs and all gradients, at two sizes, and zero at birth: what verification compares."""
    for place in {0, len(representative(CATALOGUE.get(blueprint))) - 1}:
        program = lowered(blueprint, place)
        x = example(program)
        form = pipeline(name).compile(program, x)
        found = verify(program, initial_weights(program, 0), form, x)
        assert found.output_error <= 2e-5
        assert found.gradient_error is not None
        assert found.shapes[0] == tuple(x.shape) != found.shapes[1]
        one = x[:1]  # a batch of one is where exporters like to specialise
        weights = awake(program)
        torch.testing.assert_close(form(one, weights), program.run(one, weights))


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("blueprint", ["residual_mlp", "conv3x3", "causal_attention"])
def test_a_form_follows_dtype_and_autocast(name: str, blueprint: str) -> None:
    program = lowered(blueprint)
    x = example(program)
    form = pipeline(name).compile(program, x)
    doubled, weights = x.double(), awake(program, torch.float64)
    torch.testing.assert_close(form(doubled, weights), program.run(doubled, weights), rtol=1e-12, atol=1e-12)
    weights = awake(program)
    with torch.autocast("cpu", torch.bfloat16):
        expected = program.run(x, weights)
        for _ in range(3):  # TorchScript watches the first call and optimises on the second
            made = form(x, weights)
            assert made.dtype == expected.dtype
            torch.testing.assert_close(made, expected, rtol=0.05, atol=0.05)
        torch.autograd.backward(form(x, weights).float().sum())
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in weights)
    torch.testing.assert_close(form(x, weights), program.run(x, weights))  # and back


@pytest.mark.parametrize("name", QUICK)
def test_a_form_swapped_into_a_live_kernel_keeps_output_and_training(name: str) -> None:
    program = lowered("residual_mlp")
    x = example(program)
    kernel = GraphKernel(program, x)
    with torch.no_grad():
        for parameter, value in zip(kernel.parameters(), awake(program), strict=True):
            parameter.copy_(value)
    optimizer = torch.optim.SGD(kernel.parameters(), 0.05)
    before = kernel(x)
    kernel.swap(pipeline(name).compile(program, x), name)
    torch.testing.assert_close(kernel(x), before, rtol=0, atol=1e-5)
    losses = []
    for _ in range(5):
        loss = (kernel(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_an_exported_form_is_stored_without_weights_and_comes_back() -> None:
    program = lowered("residual_mlp")
    x = example(program)
    export = pipeline("export")
    stored = export.dump(export.compile(program, x))
    assert stored is not None
    wide = CATALOGUE.get("residual_mlp").lower(program.signature, 6000)
    grown = export.dump(export.compile(wide, x))
    assert grown is not None
    assert abs(len(grown) - len(stored)) < 1000  # 480 kB of weights stay outside
    verify(program, initial_weights(program, 0), export.load(stored, program), x)


def test_the_others_store_nothing_or_print_again() -> None:
    program = lowered("low_rank")
    x = example(program)
    for name in ("eager", "torchscript"):
        form = pipeline(name).compile(program, x)
        assert pipeline(name).dump(form) is None
        verify(program, initial_weights(program, 0), pipeline(name).load(b"", program), x)
    with pytest.raises(CompileError, match="not stored"):
        pipeline("inductor").load(b"", program)


@pytest.mark.parametrize("name", ["export", "aoti"])
def test_bytes_that_are_no_form_are_refused(name: str) -> None:
    with pytest.raises(CompileError, match="does not load"):
        pipeline(name).load(b"PK\x03\x04 not a package", lowered("low_rank"))


def test_torchscript_prints_numbers_not_names() -> None:
    """Whatever a graph calls its nodes and weights, the text holds torch's functions and constants only."""
    program = Program(
        signature=Signature("vector", "parallel", 2, 2),
        weights=(),
        instructions=(
            Instruction('a"); import os', "mul", ("%x", float("inf")), "a"),
            Instruction("b", "cat", (('%a"); import os', "%x"), -1), "b"),
            Instruction("c", "pad", ("%b", (0, 0), "constant", None), "c"),
            Instruction("d", "narrow", ("%c", 1, 0, 2), "d"),
        ),
        result="%d",
        outgoing=(),
    )
    assert source(program).splitlines() == [
        "def kernel(x: Tensor, w: List[Tensor]) -> Tensor:",
        '    v0 = torch.ops.aten.mul(x, float("inf"))',
        "    v1 = torch.ops.aten.cat([v0, x], -1)",
        '    v2 = torch.ops.aten.pad(v1, [0, 0], "constant", None)',
        "    v3 = torch.ops.aten.narrow(v2, 1, 0, 2)",
        "    return v3",
    ]
    x = torch.ones(3, 2)
    assert torch.equal(pipeline("torchscript").compile(program, x)(x, []), program.run(x, []))


@pytest.mark.parametrize(
    ("argument", "message"),
    [('"); evil(', "no way to write"), ("%nowhere", "which nothing made before"), (1j, "no way to write")],
)
def test_torchscript_refuses_what_it_cannot_print(argument: object, message: str) -> None:
    program = lowered("low_rank")
    bad = replace(program.instructions[0], arguments=("%x", argument))
    with pytest.raises(CompileError, match=message):
        pipeline("torchscript").compile(replace(program, instructions=(bad,)), example(program))


@pytest.mark.parametrize("name", ["torchscript", "export"])
def test_what_torch_refuses_is_a_compile_error(name: str) -> None:
    program = lowered("low_rank")
    bad = replace(program.instructions[0], arguments=("%x", "constant", True, 3, 4, 5))
    with pytest.raises(CompileError, match="refuses the program"):
        pipeline(name).compile(
            replace(program, instructions=(bad,), result=f"%{bad.result}"), example(program)
        )


def test_a_torch_without_torchscript_has_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    script, program = pipeline("torchscript"), lowered("low_rank")
    assert script.unavailable() is None
    monkeypatch.delattr(torch.jit, "CompilationUnit")
    assert script.unavailable() == f"torch {torch.__version__} has no torch.jit.CompilationUnit"
    with pytest.raises(CompileError, match="torchscript is unavailable: torch"):
        script.compile(program, example(program))
    assert pipeline("export").compile(program, example(program))


@pytest.mark.parametrize("name", ["inductor", "aoti"])
def test_native_pipelines_need_a_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    program = lowered("low_rank")
    with pytest.raises(
        CompileError, match=rf"{name} is unavailable: .*no-such-compiler.*install one or set CXX"
    ):
        pipeline(name).compile(program, example(program))


@pytest.mark.parametrize("name", QUICK)
def test_torch_may_announce_what_it_likes(name: str) -> None:
    """Warnings are errors in every test here; this one shows that none was merely shown once before."""
    program = lowered("gated")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        used: Pipeline = pipeline(name)
        stored = used.dump(used.compile(program, example(program)))
        if stored is not None:
            used.load(stored, program)
    assert [str(warning.message) for warning in seen] == []


def test_the_toolchain_names_torch_and_the_processor() -> None:
    assert toolchain() == toolchain("cpu")
    assert torch.__version__ in toolchain()
    assert torch.backends.cpu.get_cpu_capability() in toolchain()


@NATIVE
@pytest.mark.slow
def test_inductor_trains_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "0")  # Inductor sets it and leaves it
    program = lowered("residual_mlp")
    x = example(program)
    form = pipeline("inductor").compile(program, x)
    verify(program, initial_weights(program, 0), form, x)
    assert pipeline("inductor").dump(form) is None


@NATIVE
@pytest.mark.slow
def test_aoti_is_native_code_for_inference_only() -> None:
    program = lowered("residual_mlp")
    x = example(program)
    aoti = pipeline("aoti")
    form = aoti.compile(program, x)
    verify(program, initial_weights(program, 0), form, x, trains=False)
    stored = aoti.dump(form)
    assert stored is not None
    weights = awake(program)
    loaded = aoti.load(stored, program)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, weights), program.run(x, weights))
    with pytest.raises(CompileError, match="inference only"):
        loaded(x, weights)
    loaded(x, [weight.detach() for weight in weights])  # nothing to train: no objection
