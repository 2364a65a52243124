"""Races and gates judge the user's loss: coupled, differentiating, ignoring rows, in half width."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import esper
from esper.kasmina.evidence.coupling import independent
from esper.kasmina.race.gate import MOST, bounded
from esper.kasmina.race.worth import blocks, counted
from tests.cases.loops import Batch, Ran, Task, cross_entropy, narrow, run


def gates(ran: Ran) -> list[Any]:
    """List what the gate found."""
    return [e.data for e in ran.events if e.kind == "gate"]


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss whose negatives are the other examples."""
    x = batch[0]
    return F.cross_entropy(F.normalize(model(x)) @ F.normalize(x).T * 5, torch.arange(len(x)))


def slope(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss with a penalty on the derivative by its inputs."""
    x = batch[0].detach().requires_grad_()
    u = model(x)
    (d,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return F.cross_entropy(u, batch[1]) + 0.01 * d.square().mean()


def raced(net: nn.Module, loss: Any = cross_entropy, **given: Any) -> Ran:
    """Run a race or two."""
    return run(net, loss, steps=90, growth="incubate", **given)


def test_negatives_of_the_batch_are_judged_by_blocks_of_its_size() -> None:
    ran = raced(narrow(), contrastive, probe=[Task(3)(48 * 24)])
    assert gates(ran)[0]["examples"] == 24
    assert any(one["kept"] for one in ran.outcomes())


def test_statistics_of_the_batch_are_judged_by_blocks() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(10, track_running_stats=False)
    net = nn.Sequential(nn.Linear(10, 10), norm, nn.Linear(10, 1), nn.Tanh(), nn.Linear(1, 10))
    draw = Task(3)
    ran = raced(net, probe=[draw(48) for _ in range(24)], sites="2>4")
    assert gates(ran)[0]["examples"] == 24
    assert not ran.warnings


def test_rows_that_no_loss_counts_are_passed_over() -> None:
    draw = Task()

    def quarter(n: int = 48) -> Batch:
        x, y = draw(n)
        return x, torch.where(torch.arange(n) % 4 == 0, -100, y)

    ran = raced(narrow(), draw=quarter)
    assert gates(ran)[0]["examples"] == 192
    assert any(one["kept"] for one in ran.outcomes())


def test_examples_that_the_user_values_count_one_by_one() -> None:
    def each(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0]
        return F.cross_entropy(
            F.normalize(model(x)) @ F.normalize(x).T * 5, torch.arange(len(x)), reduction="none"
        )

    assert gates(raced(narrow(), contrastive, per_example=each))[0]["examples"] == 256


def test_a_loss_that_differentiates_is_raced_and_kept() -> None:
    ran = raced(narrow(), slope)
    assert not ran.warnings
    assert any(one["kept"] for one in ran.outcomes())


def test_half_width_is_solved_in_float32() -> None:
    draw = Task()

    def half(n: int = 48) -> Batch:
        x, y = draw(n)
        return x.bfloat16(), y

    ran = raced(narrow().bfloat16(), draw=half)
    assert not ran.warnings
    assert any(one["kept"] for one in ran.outcomes())


class Endless(IterableDataset[Batch]):
    """A probe without an end."""

    def __iter__(self) -> Iterator[Batch]:
        """Draw for ever."""
        draw = Task(3)
        while True:
            yield draw(64)


def test_a_probe_without_an_end_is_read_so_far() -> None:
    assert len(list(bounded(DataLoader(Endless(), None)))) == MOST // 64
    ran = raced(narrow(), probe=DataLoader(Endless(), None))
    assert gates(ran)[0]["examples"] == MOST


def test_a_probe_with_an_end_is_read_whole() -> None:
    assert len(list(bounded([Task()(64)] * 100))) == 100


@pytest.mark.parametrize(
    ("sizes", "found"), [([50], [50]), ([120], [48, 48]), ([16] * 7, [48, 48]), ([30, 8, 96], [30, 48, 48])]
)
def test_blocks_have_the_size_of_the_loops_batch(sizes: list[int], found: list[int]) -> None:
    draw = Task()
    assert [len(x) for x, _ in blocks([draw(n) for n in sizes], 48)] == found


def test_batches_of_ignored_rows_are_left_out() -> None:
    x = torch.arange(4.0)[:, None]
    given = [(x, torch.tensor([1, -100, 2, -100])), (x, torch.full((4,), -100)), (x, torch.arange(4))]
    assert [rows.flatten().tolist() for rows, _ in counted(given)] == [[0, 2], [0, 1, 2, 3]]


def test_a_mean_by_weights_of_classes_is_not_a_mean_of_its_examples() -> None:
    net, batch = narrow(), Task()(60)
    places = esper.wrap(net, batch[0]).places
    weight = torch.linspace(0.2, 3.0, 10)
    for loss, exact in ((cross_entropy, True), (lambda m, b: F.cross_entropy(m(b[0]), b[1], weight), False)):
        assert independent(net, lambda b, loss=loss: loss(net, b), places, batch) is True
        assert independent(net, lambda b, loss=loss: loss(net, b), places, batch, exactly=True) is exact


@pytest.mark.parametrize("norm", [False, True])
def test_derivatives_by_inputs_are_right_through_an_exposed_kernel(norm: bool) -> None:
    torch.manual_seed(0)
    between = [nn.LayerNorm(4)] if norm else []
    net = nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    wrapped = esper.wrap(net, x.detach())
    name = next(iter(wrapped.places))
    layer, kernel = wrapped.layer(name, print), wrapped.places[name].kernel(2).double()
    for parameter in kernel.parameters():
        nn.init.normal_(parameter)
    layer.kernel, layer.alpha, layer.exposed = kernel, torch.tensor(1.0), True
    assert torch.autograd.gradcheck(net, x)
    assert torch.autograd.gradgradcheck(net, x)


def test_the_host_learns_nothing_through_a_kernel_unless_somebody_differentiates() -> None:
    net, x = narrow(), Task()(5)[0]
    wrapped = esper.wrap(net, x)
    layer, kernel = wrapped.layer("0>2", print), wrapped.places["0>2"].kernel(2)
    nn.init.normal_(kernel.get_parameter("consumer_weight"))
    grads = []
    for exposed in (False, True):
        layer.kernel, layer.alpha, layer.exposed = kernel, torch.tensor(1.0), exposed
        grads.append(torch.autograd.grad(net(x).sum(), list(net.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize("what", [0, 2])
@pytest.mark.parametrize("at", [3, 22, 36])
def test_a_layer_replaced_by_hand_ends_its_place_and_says_so(what: int, at: int) -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)

    def each(i: int, growth: esper.Growth) -> None:
        if i == at:
            old = net[what]
            assert isinstance(old, nn.Linear)
            net[what] = nn.Linear(old.in_features, old.out_features)
            optimizer.add_param_group({"params": net[what].parameters()})

    ran = run(net, steps=160, growth="incubate", each=each, optimizer=optimizer)
    why = f"{what} was replaced or removed since esper.grow"
    assert ran.growth.steps == 160
    assert [w for w in ran.warnings if "no longer grow" in w] == [f"0>2 can no longer grow: {why}"]
    assert not any(one["kept"] for one in ran.outcomes()[-1:])
    assert at == 3 or ran.outcomes()[-1]["reason"] == why
