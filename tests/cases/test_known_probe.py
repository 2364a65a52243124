"""A probe of examples that are trained on is no evidence; equal small numbers are no proof of that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.batches.known import Known
from tests.cases.loops import cross_entropy

STEPS = 200


def trained(data: list[Any], probe: Any, net: nn.Module, **given: Any) -> tuple[esper.Growth, list[str]]:
    """Train on the same few batches again and again; returns what was warned of, too."""
    optimizer, warned = torch.optim.Adam(net.parameters(), 1e-2), list[str]()

    def note(event: esper.Event) -> None:
        if event.kind == "warning":
            warned.append(event.data["message"])

    growth = esper.grow(
        net, optimizer, cross_entropy, probe=probe, steps=STEPS, growth="early", on_event=note, **given
    )
    for i in range(STEPS):
        loss = cross_entropy(net, data[i % len(data)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step(data[i % len(data)], loss)
    growth.finish()
    return growth, warned


def noise(batches: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Draw labels that mean nothing."""
    torch.manual_seed(0)
    return [(torch.randn(50, 20), torch.randint(0, 4, (50,))) for _ in range(batches)]


def mlp() -> nn.Module:
    """Build a host that can learn a part of the noise by heart."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 4))


def test_a_probe_of_training_data_grows_nothing_and_is_named() -> None:
    data = noise()
    fresh = [(x.clone(), y.clone()) for x, y in data[::-1]]
    growth, warned = trained(
        data, [(torch.cat([x for x, _ in fresh]), torch.cat([y for _, y in fresh]))], mlp()
    )
    assert not growth.plans
    (warning,) = warned
    assert "among those trained on" in warning
    assert "probe='stream'" in warning
    assert "among those trained on" in str(growth)
    assert not growth.growing


def test_a_stream_that_repeats_itself_is_no_stream() -> None:
    data = noise(4)
    growth, warned = trained(data, "stream", mlp(), example=data[0])
    assert not growth.plans
    assert any("had been trained on before" in one for one in warned)


def test_held_out_examples_are_not_known() -> None:
    data = noise(16)
    _, warned = trained(data[:8], data[8:], mlp())
    assert not warned


def parity(n: int) -> tuple[Tensor, Tensor]:
    """Draw from 256 examples."""
    x = torch.randint(0, 2, (n, 8))
    return x.float(), x.sum(1) % 2


def repeated(n: int) -> tuple[Tensor, Tensor]:
    """Draw from 16 long examples."""
    which = torch.randint(0, 16, (n,))
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(0))[which], which


@pytest.mark.parametrize("draw", [parity, repeated])
def test_examples_of_few_kinds_are_equal_by_chance(draw: Any) -> None:
    known = Known()
    known.learn([draw(1000)])
    assert not known.most_of([draw(400)])


LEAVES: dict[str, Any] = {
    "images": lambda n: (torch.rand(n, 3, 32, 32), torch.randint(0, 9, (n,))),
    "tokens": lambda n: {"ids": torch.randint(0, 1000, (n, 16)), "scale": 2.0},
    "texts": lambda n: (torch.randn(n, 2), [str(i) for i in range(n)]),
    "half": lambda n: torch.randn(n, 8, dtype=torch.bfloat16),
    "complex": lambda n: torch.randn(n, 4, dtype=torch.cfloat),
    "one number": lambda n: (torch.randn(n, 1), torch.randn(n, 1)),
}


@pytest.mark.parametrize("name", LEAVES)
def test_examples_of_any_kind_are_known_again(name: str) -> None:
    known, batch, other = Known(), LEAVES[name](300), LEAVES[name](300)
    known.learn([batch])
    assert known.most_of([batch])
    assert not known.most_of([other])
    half = [batch, LEAVES[name](400)]
    assert not known.most_of(half)
