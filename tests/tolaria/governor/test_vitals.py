"""What is read off a step: where, when, and how much."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from esper.tolaria.governor.vitals import SELDOM, WEIGHTS, WHOLE, Reading, VitalsReader, part


def make(rows: int = 4) -> tuple[nn.Module, torch.optim.Optimizer, VitalsReader]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(rows, rows), nn.BatchNorm1d(rows), nn.Linear(rows, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return net, optimizer, VitalsReader(net, {"optimizer": optimizer})


def backward(net: nn.Module, rows: int = 4) -> torch.Tensor:
    loss = net(torch.randn(8, rows)).square().mean()
    loss.backward()
    return loss.detach()


def test_the_norm_is_of_the_gradients_the_optimizer_used() -> None:
    net, optimizer, watcher = make()
    loss = backward(net)
    wanted = float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
    optimizer.step()
    optimizer.zero_grad()  # before anybody looked
    vitals = watcher.read(float(loss))
    assert vitals.gradient == pytest.approx(wanted)
    assert (vitals.weights, vitals.rate) == (True, 0.1)
    assert watcher.read(float(loss)).gradient is None  # no step since


def test_a_gradient_or_weight_that_is_not_finite_is_seen() -> None:
    net, optimizer, watcher = make()
    loss = backward(net)
    next(net.parameters()).grad[0, 0] = math.inf
    optimizer.step()
    assert math.isinf(watcher.read(float(loss)).gradient or 0.0)


@pytest.mark.parametrize("where", ["0.weight", "2.bias", "1.running_var"])
def test_every_weight_and_buffer_has_its_turn(where: str) -> None:
    net, _optimizer, watcher = make()
    with torch.no_grad():
        dict(net.state_dict())[where].view(-1)[-1] = math.nan
    seen = [watcher.read(1.0).weights for _ in range(WEIGHTS * SELDOM)]
    assert seen.count(False) == 1


def test_a_step_is_read_in_part_by_what_it_costs() -> None:
    assert Reading.of(1e7, 1000) == Reading(1, 0.2, 1)
    assert Reading.of(1e12, 1000) == Reading(1, 1.0, 1000)
    assert Reading.of(5e9, 10_000_000) == Reading(1, 0.01, 5)
    assert Reading.of(0.0, 1000) == Reading()


def test_readings_can_be_spaced() -> None:
    net, optimizer, watcher = make()
    watcher.reading = Reading(every=3)
    seen = []
    for _ in range(6):
        loss = backward(net)
        optimizer.step()
        seen.append(watcher.read(float(loss)).gradient is not None)
    assert seen == [False, False, True] * 2


def test_parts_cover_a_tensor_in_turn() -> None:
    tensor = torch.arange(2.0 * WHOLE).reshape(-1, 64)
    seen = torch.cat([part(tensor, 0.3, turn) for turn in range(4)])
    assert set(seen.flatten().tolist()) == set(tensor.flatten().tolist())
    small = torch.ones(WHOLE)
    assert part(small, 0.01, 5) is small


def test_a_part_stands_for_the_whole() -> None:
    net, optimizer, watcher = make(256)
    watcher.reading = Reading(share=0.25)
    loss = backward(net, 256)
    wanted = float(torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))
    optimizer.step()
    assert watcher.read(float(loss)).gradient == pytest.approx(wanted, rel=1.5)


def test_sparse_half_precision_and_absent_gradients_are_read_too() -> None:
    net = nn.ModuleList([nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3).half(), nn.Linear(2, 2)])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    watcher = VitalsReader(net, {"optimizer": optimizer})
    net[0](torch.tensor([1, 1, 4])).sum().backward()
    net[1].weight.grad = torch.full((3, 3), 3e4, dtype=torch.float16)  # its own norm has no fp16
    optimizer.step()
    assert watcher.read(1.0).gradient == pytest.approx(9e4, rel=1e-3)


def test_a_closed_watcher_leaves_no_hook() -> None:
    net, optimizer, watcher = make()
    watcher.close()
    backward(net)
    optimizer.step()
    assert watcher.read(1.0).gradient is None
