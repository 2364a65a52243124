"""From a kernel that has just been exposed to its compiled form: real workers, a real folder, real steps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.blueprints.kernel import GraphKernel
from esper.config import Kernels
from esper.contracts import Event
from esper.kasmina.widths.places import Place
from esper.tolaria.growth.run.forging import Forging

PATIENCE = 120  # seconds; a worker on a busy machine needs ten to import torch


@pytest.fixture(autouse=True)
def own_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ESPER_KERNEL_KEY", str(tmp_path / "keys" / "kernel.key"))


@pytest.fixture
def place() -> Place:
    wrapped = esper.wrap(nn.Sequential(nn.Linear(8, 6)), torch.randn(4, 8), blueprints=["residual_mlp"])
    return wrapped.places["0+residual_mlp"]


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def forging(tmp_path: Path, events: list[Event]) -> Iterator[Forging]:
    made = Forging(Kernels(pipeline="torchscript", store=tmp_path / "kernels"), events.append)
    yield made
    made.close()


def ordered(forging: Forging, place: Place, x: Tensor) -> GraphKernel:
    """File a request for a fresh kernel and collect at every boundary until its form is there."""
    kernel = place.kernel(5)
    assert isinstance(kernel, GraphKernel)
    with torch.no_grad():
        for name in kernel.outgoing:
            kernel.get_parameter(name).normal_()
    forging.file(kernel, place, 5, x)
    end = time.monotonic() + PATIENCE
    while forging.orders:
        assert time.monotonic() < end, "no form came"
        forging.collect(7)
        time.sleep(0.01)
    return kernel


def test_a_form_takes_over_within_rounding_and_training_goes_on(
    forging: Forging, place: Place, events: list[Event], tmp_path: Path
) -> None:
    x = torch.randn(16, 8)
    kernel = ordered(forging, place, x)
    (event,) = events
    assert (event.kind, event.step, event.data["kernel"]) == ("compiled", 7, "forge")
    assert kernel.pipeline == "torchscript"
    assert kernel.form is not None
    compiled, form = kernel(x), kernel.form
    kernel.swap(None, "eager")
    torch.testing.assert_close(compiled, kernel(x), rtol=1e-5, atol=1e-5)
    kernel.swap(form, "torchscript")
    held = list(kernel.parameters())
    optimizer = torch.optim.Adam(held, 0.01)
    losses = []
    for _ in range(20):
        loss = (kernel(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(a is b for a, b in zip(held, kernel.parameters(), strict=True))

    again = Forging(Kernels(pipeline="torchscript", store=tmp_path / "kernels"), events.append)
    try:
        again.forge.close()  # type: ignore[union-attr] - what is kept needs no worker
        assert ordered(again, place, x).pipeline == "torchscript"
        assert events[-1].data["kernel"] == "store"
        ordered(again, place, x)
        assert again.cache.statistics().hits == 1
    finally:
        again.close()
    forging.close()
    assert kernel.pipeline == "eager"
    assert kernel.form is None


def test_a_damaged_container_is_built_again(forging: Forging, place: Place, events: list[Event]) -> None:
    x = torch.randn(16, 8)
    ordered(forging, place, x)
    (container,) = [p for p in Path(forging.settings.store or "").rglob("*") if p.is_file()]
    container.write_bytes(container.read_bytes()[:-1])
    forging.cache.clear()
    ordered(forging, place, x)
    assert [event.data["kernel"] for event in events] == ["forge", "forge"]


def test_what_cannot_be_compiled_goes_on_eagerly_and_says_so(
    tmp_path: Path, place: Place, events: list[Event]
) -> None:
    forging = Forging(Kernels(pipeline="nonsense", store=tmp_path / "kernels"), events.append)
    try:
        kernel = ordered(forging, place, torch.randn(16, 8))
    finally:
        forging.close()
    assert kernel.pipeline == "eager"
    (event,) = events
    assert event.kind == "fallback"
    assert "goes on eagerly" in event.data["why"]
    assert "nonsense" in event.data["why"]


def test_eager_starts_nothing(place: Place, events: list[Event]) -> None:
    forging = Forging(Kernels(), events.append)
    assert forging.forge is None
    forging.file(place.kernel(5), place, 5, torch.randn(16, 8))
    assert forging.orders == []
