"""A loop that fills the same tensors at every step: what is kept of a batch is a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import esper
from esper.batches.examples import copied
from tests.cases.loops import Task, cross_entropy, narrow, run, train


class Refilled:
    """Draws batches into the same two tensors; a probe's, which are larger, are its own."""

    def __init__(self, numpy: bool) -> None:
        self.draw = Task()
        buffers = np.zeros((48, 10), np.float32), np.zeros(48, np.int64)
        self.x, self.y = map(torch.from_numpy, buffers) if numpy else map(torch.tensor, buffers)

    def __call__(self, n: int = 48) -> tuple[Tensor, Tensor]:
        """Fill them."""
        x, y = self.draw(n)
        if n != 48:
            return x, y
        self.x.data.copy_(x)
        self.y.data.copy_(y)
        return self.x, self.y


@pytest.mark.parametrize("numpy", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_buffers_that_are_filled_again_grow_what_fresh_batches_grow(numpy: bool, stream: bool) -> None:
    nets, given = (narrow(), narrow()), dict[str, Any]()
    if stream:
        given = {"probe": "stream", "example": Task(3)(64)}
    for net, draw in zip(nets, (Task(), Refilled(numpy)), strict=True):
        run(net, draw=draw, **given)
    assert nets[0][0].out_features > 1
    for own, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(own, other)


def test_races_see_what_was_trained_on_too() -> None:
    draw, net = Refilled(False), narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    growth = esper.grow(net, optimizer, cross_entropy, probe=[draw(256)], steps=60, growth="incubate")
    train(growth, net, optimizer, draw, 5)
    kept = [batch[0] for batch in growth.run.batches]
    assert len(kept) > 1
    assert not any(torch.equal(one, other) for i, one in enumerate(kept) for other in kept[:i])


def test_a_copy_has_no_graph_and_keeps_what_is_no_tensor() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    batch = {"x": x * 2, "leaf": x, "names": ["a", "b", "c", "d"], "n": 4, "y": np.zeros(4)}
    kept = copied(batch)
    assert kept["x"].is_leaf
    assert kept["x"].requires_grad
    assert torch.equal(kept["x"], batch["x"])
    assert kept["leaf"] is not x
    assert (kept["names"], kept["n"]) == (batch["names"], 4)
    assert kept["names"] is not batch["names"]
    assert kept["y"] is not batch["y"]
