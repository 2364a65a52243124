"""A request becomes the same kernel every time, and a kernel becomes what a live one needs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import safetensors.torch
import torch

from esper.blueprints import CATALOGUE
from esper.blueprints.kernel import initial_weights
from esper.contracts import Kernel, Signature, kernel_id
from esper.errors import BlueprintError, CompileError, KernelError, RegistryError
from esper.tezzeret.build import KernelRequest, build, request_id, revive, warm
from esper.tezzeret.container import open_sealed, seal
from esper.tezzeret.toolchain import toolchain

GRAPH = CATALOGUE.get("residual_mlp")
REQUEST = KernelRequest(GRAPH.to_json(), Signature("vector", "parallel", 6, 5), 4, 7, (4, 6))
KEY = bytes(range(32))
QUICK = ["eager", "export", "torchscript"]


@pytest.mark.parametrize("name", [*QUICK, "auto"])
def test_building_twice_is_building_once(name: str) -> None:
    request = replace(REQUEST, pipeline=name, budget_seconds=0.1)
    torch.manual_seed(1)
    first = build(request)
    torch.manual_seed(2)
    second = build(request)
    assert first.id == second.id == request_id(request)
    assert first.weights == second.weights
    facts = (first.graph, first.signature, first.hidden, first.seed, first.pipeline, first.toolchain)
    assert first.id == kernel_id(*facts)
    assert json.loads(json.dumps(dict(first.report))) == first.report


def test_what_makes_a_kernel_makes_its_id() -> None:
    """Not its example, its budget or the spaces in its graph."""
    same = [
        replace(REQUEST, shape=(9, 6)),
        replace(REQUEST, budget_seconds=9.0),
        replace(REQUEST, graph=json.dumps(json.loads(REQUEST.graph), indent=2)),
    ]
    other = [
        replace(REQUEST, seed=8),
        replace(REQUEST, hidden=5),
        replace(REQUEST, pipeline="export"),
        replace(REQUEST, signature=replace(REQUEST.signature, outputs=6)),
        replace(REQUEST, graph=CATALOGUE.get("gated").to_json()),
    ]
    assert {request_id(one) for one in same} == {request_id(REQUEST)}
    assert len({request_id(one) for one in [REQUEST, *other]}) == len(other) + 1


@pytest.mark.parametrize("name", QUICK)
def test_build_seal_open_revive_and_train(name: str) -> None:
    kernel = build(replace(REQUEST, pipeline=name))
    assert kernel.toolchain == toolchain()
    assert set(kernel.variants) == ({"export"} if name == "export" else set())
    program, weights, form = revive(open_sealed(seal(kernel, KEY), KEY, kernel.id))
    assert program == GRAPH.lower(REQUEST.signature, REQUEST.hidden)
    for key, expected in initial_weights(program, REQUEST.seed).items():
        assert torch.equal(weights[key], expected)
    assert (form is None) == (name == "eager")
    run = form or program.run
    live = [weight.clone().requires_grad_() for weight in weights.values()]
    x = torch.randn(11, 6)
    assert not run(x, live).any()
    loss = (run(x, live) - 1).square().mean()
    loss.backward()
    assert all(weight.grad is not None for weight in live)


def test_auto_reports_all_it_tried() -> None:
    kernel = build(replace(REQUEST, pipeline="auto", budget_seconds=10.0))
    assert kernel.pipeline == "auto"
    assert kernel.report["pipeline"] in QUICK
    assert sorted(kernel.report["candidates"]) == QUICK
    for name in QUICK:
        found = kernel.report["candidates"][name]
        assert found["milliseconds"] > 0
        assert found["verified"]["output_error"] <= 2e-5
    chosen = kernel.report["candidates"][kernel.report["pipeline"]]
    assert chosen["tags"] == (["fast"] if kernel.report["pipeline"] != "eager" else [])
    assert revive(kernel)[0].signature == REQUEST.signature


def test_auto_leaves_out_what_cannot_train_or_comes_too_late() -> None:
    request = replace(REQUEST, pipeline="auto", candidates=("aoti", "torchscript"), budget_seconds=5.0)
    found = build(request).report["candidates"]
    assert found["aoti"] == {"refused": "it cannot train"}
    assert found["torchscript"]["speedup"] > 0
    assert "export" not in found
    late = build(replace(request, budget_seconds=0.0)).report["candidates"]
    assert late["torchscript"] == {"refused": "the budget ran out before it was compiled"}
    assert late["eager"]["rounds"] == 5


def test_auto_goes_on_without_a_pipeline_torch_has_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.jit, "CompilationUnit")
    found = build(replace(REQUEST, pipeline="auto", budget_seconds=1.0)).report
    assert "has no torch.jit.CompilationUnit" in found["candidates"]["torchscript"]["refused"]
    assert found["pipeline"] in ("eager", "export")


def test_no_clock_decides_a_deterministic_build() -> None:
    kernel = build(replace(REQUEST, pipeline="auto", deterministic=True))
    assert kernel.report["pipeline"] == "eager"
    assert kernel.report["candidates"] == {}
    assert build(replace(REQUEST, pipeline="export", deterministic=True)).report["pipeline"] == "export"


def test_a_form_of_another_toolchain_is_made_again_not_read() -> None:
    kernel = build(replace(REQUEST, pipeline="export"))
    elsewhere = replace(kernel, toolchain="torch 1.0, another machine", variants={"export": b"not for us"})
    program, weights, form = revive(elsewhere)
    assert form is not None
    x = torch.randn(3, 6)
    torch.testing.assert_close(form(x, list(weights.values())), program.run(x, list(weights.values())))
    with pytest.raises(CompileError, match="does not load"):
        revive(replace(elsewhere, toolchain=kernel.toolchain))


def test_weights_that_are_not_the_programs_are_refused() -> None:
    kernel: Kernel = build(replace(REQUEST, pipeline="eager"))
    for weights, message in (
        (b"no safetensors", "damaged"),
        (safetensors.torch.save({"w": torch.ones(1)}), "its graph needs"),
    ):
        with pytest.raises(KernelError, match=message):
            revive(replace(kernel, weights=weights))
    with pytest.raises(KernelError, match="'pipeline' in its report; build it again"):
        revive(replace(kernel, report={}))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"graph": "{}"}, BlueprintError, "graph"),
        ({"pipeline": "torchscrypt"}, RegistryError, "did you mean 'torchscript'"),
        ({"shape": (4, 5)}, CompileError, "not a vector of 6 channels"),
        ({"signature": Signature("image", "parallel", 6, 5)}, BlueprintError, "image"),
        ({"hidden": 0}, BlueprintError, "hidden"),
    ],
)
def test_a_bad_request_says_what_is_bad(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build(replace(REQUEST, **changes))


def test_a_request_is_json() -> None:
    facts = json.loads(json.dumps(asdict(REQUEST)))
    facts |= {"signature": Signature.from_dict(facts["signature"]), "shape": tuple(facts["shape"])}
    assert KernelRequest(**{**facts, "candidates": tuple(facts["candidates"])}) == REQUEST


def test_warming_up_moves_no_random_stream() -> None:
    state = torch.get_rng_state()
    warm()
    assert torch.equal(torch.get_rng_state(), state)
