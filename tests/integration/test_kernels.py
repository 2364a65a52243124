"""The whole catalogue from request to training: built, verified, sealed, stored, opened, revived, trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esper.blueprints import CATALOGUE
from esper.blueprints.kernel import GraphKernel
from esper.blueprints.representative import HIDDEN, representative
from esper.blueprints.sizes import example_shapes
from esper.tezzeret.build import KernelRequest, build, revive
from esper.tezzeret.container import open_sealed, seal
from esper.urza.folder import FolderStore

KEY = bytes(range(32))


@pytest.mark.parametrize("pipeline", ["eager", "torchscript", "export"])
@pytest.mark.parametrize("name", CATALOGUE.names())
def test_a_kernel_survives_compile_store_load_and_train(name: str, pipeline: str, tmp_path: Path) -> None:
    graph = CATALOGUE.get(name)
    signature = representative(graph)[0]
    (given, wanted), *_ = example_shapes(signature)
    request = KernelRequest(graph.to_json(), signature, HIDDEN, 3, (4, *given[1:]), pipeline)
    built = build(request)
    store = FolderStore(tmp_path)
    store.put(built.id, seal(built, KEY))
    container = store.get(built.id)
    assert container is not None
    kernel = open_sealed(container, KEY, built.id)
    assert kernel == built
    program, weights, form = revive(kernel)

    live = GraphKernel(program)
    live.load_state_dict(weights)
    live.swap(form, pipeline)
    x = torch.randn(4, *given[1:])
    target = torch.randn(4, *wanted[1:])
    assert torch.equal(live(x), torch.zeros_like(target))
    optimizer = torch.optim.Adam(live.parameters(), 0.02)
    losses = []
    for _ in range(15):
        loss = (live(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    trained = live(x).detach()
    live.swap(None, "eager")
    torch.testing.assert_close(live(x).detach(), trained, rtol=1e-5, atol=1e-5)
