"""What the forge builds when nobody says otherwise: kernels of shipped blueprints, and none of bad ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from esper.blueprints import CATALOGUE
from esper.contracts import Signature
from esper.errors import BlueprintError, CompileError, EsperError, ForgeError
from esper.tezzeret.build import KernelRequest, build, request_id, revive
from esper.tezzeret.forge import Forge
from esper.tezzeret.limits import MIB, Limits

SECONDS = 60
GRAPH = CATALOGUE.get("residual_mlp").to_json()
REQUEST = KernelRequest(GRAPH, Signature("vector", "parallel", 8, 8), hidden=4, seed=3, shape=(16, 8))


@pytest.fixture(scope="module")
def forge() -> Iterator[Forge]:
    with Forge(limits=Limits(wall=20, request=100 * MIB)) as forge:
        yield forge


def test_a_forged_kernel_is_the_one_this_process_would_build(forge: Forge) -> None:
    made, here = forge.submit(REQUEST).result(SECONDS), build(REQUEST)
    assert made.id == here.id == request_id(REQUEST)
    assert made.weights == here.weights
    program, weights, form = revive(made)
    x = torch.randn(5, 8)
    assert form is not None
    tensors = list(weights.values())
    torch.testing.assert_close(form(x, tensors), program.run(x, tensors))


def changed(**parts: object) -> str:
    return json.dumps({**json.loads(GRAPH), **parts})


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (replace(REQUEST, graph="{"), BlueprintError),
        (replace(REQUEST, graph="[" * 100_000), EsperError),
        (replace(REQUEST, graph=GRAPH.replace("gelu", "os.system")), BlueprintError),
        (replace(REQUEST, graph=changed(nodes=[])), BlueprintError),
        (replace(REQUEST, graph=changed(nodes=json.loads(GRAPH)["nodes"] * 300_000)), EsperError),
        (replace(REQUEST, signature=Signature("image", "parallel", 8, 8)), BlueprintError),
        (replace(REQUEST, hidden=10**9), EsperError),
        (replace(REQUEST, shape=(10**12, 8)), EsperError),
        (replace(REQUEST, pipeline="magic"), CompileError),
    ],
    ids="torn deep unknown-op empty a-million-nodes misfit wide huge-input unknown-pipeline".split(),
)
def test_bad_requests_end_in_an_error_and_the_next_one_works(
    forge: Forge, request_: KernelRequest, kind: type[EsperError]
) -> None:
    ticket = forge.submit(request_)
    with pytest.raises(kind):
        ticket.result(SECONDS)
    assert isinstance(ticket.state, str)
    assert forge.submit(replace(REQUEST, seed=99)).result(SECONDS).seed == 99


def test_a_request_the_caller_would_wait_for_is_refused() -> None:
    with Forge() as forge, pytest.raises(ForgeError, match=r"Limits\.request"):
        forge.submit(replace(REQUEST, graph="x" * 2_000_000))
