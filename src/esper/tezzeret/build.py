"""Builds kernels: a pure function from a request to facts and bytes, so a lost one is simply built again."""

from __future__ import annotations

import functools
import time as clock
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from esper.blueprints.graph import Graph
from esper.blueprints.kernel import initial_weights
from esper.blueprints.program import Form, Instruction, Program, Weight
from esper.contracts import Kernel, Signature, kernel_id
from esper.errors import CompileError, KernelError
from esper.tezzeret.characterise import REFERENCE, characterise, fastest
from esper.tezzeret.pipelines import PIPELINES, Pipeline
from esper.tezzeret.toolchain import toolchain
from esper.tezzeret.verify import example_input, verify

AUTO = "auto"
SHARE = 0.5  # of the budget for compiling candidates; the rest is for timing them


@dataclass(frozen=True, slots=True)
class KernelRequest:
    """What to build; JSON values only, so it travels to a worker.

    Attributes:
        graph: A blueprint's JSON.
        shape: Shape of a typical input, batch first; the kernel runs at every size.
        pipeline: A name, or "auto": the fastest right one on this device, eager unless one is 5 % faster.
        budget_seconds: For what "auto" compiles and times; a pipeline once begun is finished.
        deterministic: No clock decides: "auto" is eager, any other name is itself.
        candidates: Pipelines "auto" tries besides eager; empty for every pipeline that trains and compiles in
            milliseconds.
    """

    graph: str
    signature: Signature
    hidden: int
    seed: int
    shape: tuple[int, ...]
    pipeline: str = "torchscript"
    device: str = "cpu"
    budget_seconds: float = 1.0
    deterministic: bool = False
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Built:
    """A form that passed, and what it took."""

    form: Form
    report: dict[str, object]


def request_id(request: KernelRequest) -> str:
    """Return the id the built kernel will have; nothing is compiled.

    Raises:
        BlueprintError: The graph is not valid.
    """
    graph = Graph.from_json(request.graph).to_json()
    made = toolchain(request.device)
    return kernel_id(graph, request.signature, request.hidden, request.seed, request.pipeline, made)


def build(request: KernelRequest) -> Kernel:
    """Build one kernel: graph, program, initial weights, compiled form, verification.

    Its id follows from the request and the toolchain. Under "auto" the clock has a say in which form is kept,
    but not in the id: ``report["pipeline"]`` names the form, ``pipeline`` what was asked for.

    Raises:
        BlueprintError: The graph is not valid or does not fit the signature.
        CompileError: The pipeline is unavailable, cannot compile it, or what it made is wrong.
        RegistryError: There is no such pipeline.
    """
    graph = Graph.from_json(request.graph)
    program = graph.lower(request.signature, request.hidden)
    weights = initial_weights(program, request.seed)
    example = example_input(program.signature, request.shape).to(request.device)
    kept, tried = request.pipeline, dict[str, object]()
    if kept == AUTO:
        kept, built, tried = _choose(request, program, weights, example)
    else:
        built = _compiled(pipeline(kept), program, weights, example)
    form = pipeline(kept).dump(built.form)
    made = toolchain(request.device)
    text = graph.to_json()
    return Kernel(
        id=kernel_id(text, request.signature, request.hidden, request.seed, request.pipeline, made),
        graph=text,
        signature=request.signature,
        hidden=request.hidden,
        seed=request.seed,
        pipeline=request.pipeline,
        toolchain=made,
        weights=safetensors.torch.save(weights),
        variants={} if form is None else {kept: form},
        report={
            "pipeline": kept,
            "shape": list(request.shape),
            "device": request.device,
            **built.report,
            "candidates": tried,
        },
    )


def revive(kernel: Kernel) -> tuple[Program, dict[str, Tensor], Form | None]:
    """Return what a live kernel needs: program, weights, and the compiled form (None for eager).

    A stored form is read if this toolchain made it, and otherwise compiled again from the graph, which is the
    truth; so is one that is never stored. Background pipelines take seconds then.

    SECURITY: a stored form may hold native code and pickles. Digest and signature of the container the kernel
    came from have been checked before; a kernel just built here is as good.

    Raises:
        BlueprintError: The graph is not valid or does not fit the signature.
        CompileError: The pipeline is unavailable here or cannot compile it.
        KernelError: The weights are not the program's, or the report lacks what reviving needs.
    """
    program = Graph.from_json(kernel.graph).lower(kernel.signature, kernel.hidden)
    weights = _weights(kernel, program)
    try:
        name, device, shape = (kernel.report[key] for key in ("pipeline", "device", "shape"))
    except KeyError as error:
        raise KernelError(f"kernel {kernel.id} has no {error} in its report; build it again") from error
    if not isinstance(name, str) or not isinstance(device, str) or not isinstance(shape, Sequence):
        raise KernelError(
            f"kernel {kernel.id} has a report that names no pipeline, device and shape; build it again"
        )
    if name == REFERENCE:
        return program, weights, None
    chosen = pipeline(name)
    stored = kernel.variants.get(name)
    if stored is not None and kernel.toolchain == toolchain(device):
        return program, weights, chosen.load(stored, program)
    return program, weights, chosen.compile(program, example_input(program.signature, shape).to(device))


@functools.cache  # the registry reads every installed package's entry points, 3 ms a time
def pipeline(name: str) -> Pipeline:
    """Find a pipeline.

    Raises:
        RegistryError: There is none of this name; the message lists those that exist.
    """
    return PIPELINES.get(name)


def warm() -> None:
    """Pay what the first compilation of a process pays: 1–2 s, mostly the exporter's imports."""
    signature = Signature("vector", "parallel", 2, 2)
    weights = (Weight("down.weight", (2, 2), "zeros"),)
    tiny = Program(
        signature,
        weights,
        (Instruction("out", "linear", ("%x", "@down.weight"), "out"),),
        "%out",
        ("down.weight",),
    )
    example = example_input(signature, (2, 2))
    for name in ("torchscript", "export"):
        if pipeline(name).unavailable() is None:
            made = _compiled(pipeline(name), tiny, initial_weights(tiny, 0), example)
            pipeline(name).dump(made.form)


def _compiled(chosen: Pipeline, program: Program, weights: Mapping[str, Tensor], example: Tensor) -> Built:
    """Compile and verify."""
    start = clock.perf_counter()
    form = chosen.compile(program, example)
    taken = (clock.perf_counter() - start) * 1e3
    checked = verify(program, weights, form, example, trains=chosen.trains)
    return Built(form, {"compile_milliseconds": taken, "verified": checked.to_dict()})


def _choose(
    request: KernelRequest, program: Program, weights: Mapping[str, Tensor], example: Tensor
) -> tuple[str, Built, dict[str, object]]:
    """Compile what is allowed and within the budget, time what is right; return the best and all findings."""
    start = clock.perf_counter()
    built = {REFERENCE: _compiled(pipeline(REFERENCE), program, weights, example)}
    found: dict[str, object] = {}
    if request.deterministic:
        return REFERENCE, built[REFERENCE], found
    for name in request.candidates or _quick():
        if name == REFERENCE:
            continue
        if clock.perf_counter() - start > request.budget_seconds * SHARE:
            found[name] = {"refused": "the budget ran out before it was compiled"}
            continue
        chosen = pipeline(name)
        if not chosen.trains:
            found[name] = {"refused": "it cannot train"}
            continue
        try:
            built[name] = _compiled(chosen, program, weights, example)
        except CompileError as error:
            found[name] = {"refused": str(error)}
    tensors = [weights[weight.name].to(example.device) for weight in program.weights]
    left = request.budget_seconds - (clock.perf_counter() - start)
    figures = characterise({name: one.form for name, one in built.items()}, tensors, example, left)
    found |= {name: {**one.to_dict(), **built[name].report} for name, one in figures.items()}
    kept = fastest(figures)
    return kept, built[kept], found


def _quick() -> list[str]:
    """List the pipelines that train and need no background."""
    found = {name: pipeline(name) for name in PIPELINES.names()}
    return [name for name, one in found.items() if one.trains and not one.background_only]


def _weights(kernel: Kernel, program: Program) -> dict[str, Tensor]:
    try:
        loaded = safetensors.torch.load(kernel.weights)
    except SafetensorError as error:
        raise KernelError(f"the weights of kernel {kernel.id} are damaged: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    if shapes != (wanted := {weight.name: weight.shape for weight in program.weights}):
        raise KernelError(f"kernel {kernel.id} has weights {shapes}, its graph needs {wanted}")
    return {weight.name: loaded[weight.name] for weight in program.weights}
