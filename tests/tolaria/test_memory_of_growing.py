"""Growing keeps nothing alive that it no longer needs: not until the next garbage collection, either."""

from __future__ import annotations

import gc
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.tolaria.growth.early import aside, hindsight, insertion
from tests.tolaria.test_spread_looks import batch, squared

STEPS = 100


class Block(nn.Module):
    """Adds to a stream what a narrow layer makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Run:
    """A host that is too narrow, and its loop."""

    def __init__(self, dear: float = math.inf, steps: int = STEPS) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(Block(), Block(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.01)
        probe = [batch(1000 + i) for i in range(4)]
        self.growth = esper.grow(self.net, self.optimizer, squared, probe=probe, steps=steps)
        assert self.growth.loop.early is not None
        self.early = self.growth.loop.early
        self.early.evidence.dear = dear

    def step(self, index: int) -> None:
        given = batch(index)
        loss = squared(self.net, given)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.growth.step(given, loss)


@pytest.mark.parametrize("dear", [0.0, math.inf])
def test_no_tensor_waits_for_the_garbage_collector(dear: float) -> None:
    gc.collect()
    others = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]  # other tests'
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)  # whatever a cycle holds comes to light
    try:
        run = Run(dear)
        for index in range(STEPS):
            run.step(index)
        run.growth.finish()
        gc.collect()
        left = [tuple(one.shape) for one in gc.garbage if isinstance(one, Tensor)]
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    del others
    assert run.growth.plans
    assert left == []


def test_copies_on_the_disk_and_memory_given_back_change_no_bit(monkeypatch: Any) -> None:
    plain = Run()
    for index in range(STEPS):
        plain.step(index)
    for name in ("LARGE", "MUCH", "SOME"):
        monkeypatch.setattr(aside, name, 1)
        if hasattr(insertion, name):
            monkeypatch.setattr(insertion, name, 1)
    mapped, other = list[bool](), Run()
    for index in range(STEPS):
        other.step(index)
        mapped += [] if other.early.open is None else [other.early.open.before.mapped]
    assert plain.growth.plans
    assert mapped
    assert all(mapped)
    for name, tensor in plain.net.state_dict().items():
        assert torch.equal(other.net.state_dict()[name], tensor), name


@pytest.mark.parametrize("large", [1, 2**40])
def test_an_event_taken_back_from_the_disk_is_taken_back_to_the_bit(large: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(aside, "LARGE", large)
    run = opened()
    judged = run.early.open
    assert judged is not None
    assert judged.before.mapped == (large == 1)
    then = {name: tensor.clone() for name, tensor in judged.before.tensors[0].items()}
    states = [{name: dict(state) for name, state in one.items()} for one in judged.before.states]
    run.early.insertion.restore(judged.before)
    assert all(torch.equal(tensor, then[name]) for name, tensor in run.net.named_parameters())
    for name, parameter in run.net.named_parameters():
        kept: Any = states[0][name]["exp_avg"]
        assert torch.equal(run.optimizer.state[parameter]["exp_avg"], kept.copy)


def opened() -> Run:
    """Train until an event waits to be judged, and two steps more."""
    run, index, since = Run(), 0, 0
    while since < 2:
        run.step(index)
        index, since = index + 1, since + (run.early.open is not None)
    return run


def test_weights_from_before_stand_in_the_host_once_and_what_came_later_as_it_is() -> None:
    run = opened()
    judged = run.early.open
    assert judged is not None
    run.net[4].register_parameter("late", nn.Parameter(torch.full((3,), 7.0)))
    now = {name: tensor.clone() for name, tensor in run.net.state_dict().items()}
    pointers = {name: tensor.data_ptr() for name, tensor in run.net.named_parameters()}
    with run.early.hindsight.weights_of(judged.before):
        inside = dict(run.net.named_parameters())
        assert all(torch.equal(inside[name], tensor) for name, tensor in judged.before.tensors[0].items())
        assert torch.equal(inside["4.late"], now["4.late"])
        assert not {tensor.data_ptr() for tensor in inside.values()} & set(pointers.values())
    assert {name: tensor.data_ptr() for name, tensor in run.net.named_parameters()} == pointers
    assert all(torch.equal(run.net.state_dict()[name], tensor) for name, tensor in now.items())


def test_weights_of_now_are_not_copied_to_look_back(monkeypatch: Any) -> None:
    run = opened()
    judged = run.early.open
    assert judged is not None
    copied = list[tuple[int, ...]]()
    made = hindsight.fresh
    monkeypatch.setattr(hindsight, "fresh", lambda one: copied.append(tuple(one.shape)) or made(one))
    with run.early.hindsight.weights_of(judged.before):
        pass
    assert copied == []
