"""The rules for new state, replaced parameters, several optimizers, and what is refused."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import ASGD, LBFGS, SGD, Adafactor, Adagrad, Adam, Optimizer, Rprop

from esper.contracts import WidenEdit, WidenPlan
from esper.errors import SurgeryError
from esper.surgery.optimizers.widening import widen_state
from esper.surgery.widen_layers import Change, Widened, widen


def train(model: nn.Module, *optimizers: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture
def grow(plan_of: Callable, slices_of: Callable) -> Callable[[nn.Module], Widened]:
    return lambda model: widen(model, plan_of(3, 5), slices_of(model, plan_of(3, 5)))


def test_mean_fills_new_units_with_the_mean_of_the_old(host: nn.Module, grow: Callable) -> None:
    optimizer = Adam(host.parameters())
    train(host, optimizer)
    before = copy.deepcopy(optimizer.state[host.fc2.weight])
    assert widen_state({"main": optimizer}, grow(host).changes, "mean") == []
    after = optimizer.state[host.fc2.weight]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[key][:, :3], before[key])
        expected = before[key].mean(1, keepdim=True).expand(5, 2)
        assert torch.equal(after[key][:, 3:], expected)
    assert after["step"] == 3


def test_seed_takes_what_the_incubator_learned_and_says_what_it_lacked(
    host: nn.Module, grow: Callable
) -> None:
    optimizer = Adam(host.parameters())
    train(host, optimizer)
    donor: dict[str, dict[str, Any]] = {
        "fc1.weight": {
            "step": torch.tensor(9.0),
            "exp_avg": torch.ones(2, 4),
            "exp_avg_sq": torch.full((2, 4), 2.0),
        },
        "fc2.weight": {"exp_avg": torch.ones(5, 7)},
    }
    reasons = widen_state({"main": optimizer}, grow(host).changes, "seed", donor)
    state = optimizer.state[host.fc1.weight]
    assert state["exp_avg"][3:].eq(1).all()
    assert state["exp_avg_sq"][3:].eq(2).all()
    assert state["step"] == 3
    assert not optimizer.state[host.fc2.weight]["exp_avg"][:, 3:].any()
    assert (
        "Adam 'main': state 'exp_avg' of 'fc2.weight': the seed has a tensor of shape (5, 7) for (5, 2)"
        in str(reasons)
    )
    assert "state 'exp_avg_sq' of 'fc2.weight': the seed has nothing for (5, 2)" in str(reasons)
    assert len(reasons) == 2 + 2 * 3  # fc2.weight; fc1.bias, norm.weight and norm.bias were not in the donor


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (lambda ps: Adagrad(ps, initial_accumulator_value=0.25), "sum", 0.25),
        (lambda ps: Rprop(ps, lr=0.125), "step_size", 0.125),
        (lambda ps: SGD(ps, lr=0.1, momentum=0.9), "momentum_buffer", 0.0),
    ],
)
def test_new_units_are_born_as_the_optimizer_would_have_it(
    host: nn.Module, grow: Callable, make: Callable, key: str, value: float
) -> None:
    optimizer = make(host.parameters())
    train(host, optimizer)
    widen_state({"main": optimizer}, grow(host).changes)
    assert optimizer.state[host.fc1.weight][key][3:].eq(value).all()
    train(host, optimizer)


@pytest.mark.parametrize("order", [1, -1])
def test_each_parameter_is_of_its_own_group(host: nn.Module, grow: Callable, order: int) -> None:
    narrow = {"params": [host.fc1.weight, host.fc1.bias], "lr": 0.125}
    rest = {"params": [p for p in host.parameters() if all(p is not q for q in host.fc1.parameters())]}
    optimizer = Rprop([narrow, {**rest, "lr": 0.25}][::order])
    train(host, optimizer)
    blocker = weakref.ref(host.fc1.weight)
    widened = grow(host)
    assert [change.edit.name for change in widened.replaced] == ["fc1.weight"]
    widen_state({"main": optimizer}, widened.changes)
    (group,) = (group for group in optimizer.param_groups if group["lr"] == 0.125)
    assert [id(p) for p in group["params"]] == [id(host.fc1.weight), id(host.fc1.bias)]
    assert optimizer.state[host.fc1.weight]["step_size"][3:].eq(0.125).all()
    assert optimizer.state[host.fc1.bias]["step_size"][3:].eq(0.125).all()
    assert optimizer.state[host.fc2.weight]["step_size"][:, 3:].eq(0.25).all()
    assert blocker() is not host.fc1.weight


def test_an_optimizer_that_owns_nothing_of_it_is_left_alone(host: nn.Module, grow: Callable) -> None:
    """Else it would forget a history that still holds."""
    apart = nn.Linear(2, 1)
    other = LBFGS(apart.parameters())

    def closure() -> Tensor:
        other.zero_grad()
        loss = apart(torch.ones(3, 2)).square().mean()
        loss.backward()
        return loss

    other.step(closure)
    before = copy.deepcopy(other.state_dict())
    assert widen_state({"main": Adam(host.parameters()), "other": other}, grow(host).changes) == []
    assert str(other.state_dict()) == str(before)


def test_a_parameter_that_changed_identity_is_followed(host: nn.Module, grow: Callable) -> None:
    optimizer = Adam(host.parameters())
    train(host, optimizer)
    old, position = host.fc1.weight, list(host.parameters()).index(host.fc1.weight)
    moment = optimizer.state[old]["exp_avg"].clone()
    blocker = weakref.ref(old)
    widened = grow(host)
    assert [change.edit.name for change in widened.replaced] == ["fc1.weight"]
    widen_state({"main": optimizer}, widened.changes)
    assert optimizer.param_groups[0]["params"][position] is host.fc1.weight
    assert all(
        mine is theirs
        for mine, theirs in zip(optimizer.param_groups[0]["params"], host.parameters(), strict=True)
    )
    assert old not in optimizer.state
    assert torch.equal(optimizer.state[host.fc1.weight]["exp_avg"][:3], moment)
    before = host.fc1.weight.clone()
    train(host, optimizer, steps=1)
    assert not torch.equal(before, host.fc1.weight)
    assert blocker() is old


def test_a_parameter_that_changed_identity_before_the_first_step_is_followed(
    host: nn.Module, grow: Callable
) -> None:
    optimizer = Adam(host.parameters())
    blocker = weakref.ref(host.fc1.weight)
    widened = grow(host)
    assert [change.edit.name for change in widened.replaced] == ["fc1.weight"]
    widen_state({"main": optimizer}, widened.changes)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in host.parameters()]
    assert not optimizer.state
    assert blocker() is not host.fc1.weight


def test_before_the_first_step_there_is_nothing_to_widen(host: nn.Module, grow: Callable) -> None:
    optimizer = Adam(host.parameters())
    widen_state({"main": optimizer}, grow(host).changes)
    assert not optimizer.state
    train(host, optimizer)
    assert optimizer.state[host.fc1.weight]["exp_avg"].shape == (5, 4)


def test_frozen_parameters_and_several_optimizers(host: nn.Module, grow: Callable) -> None:
    host.fc1.requires_grad_(False)
    first = SGD(host.norm.parameters(), lr=0.1, momentum=0.9)
    second = Adam([host.fc2.weight, host.fc2.bias, host.embed.weight])
    train(host, first, second)
    widen_state({"norms": first, "rest": second}, grow(host).changes)
    assert first.state[host.norm.weight]["momentum_buffer"].shape == (5,)
    assert second.state[host.fc2.weight]["exp_avg"].shape == (5, 5)
    assert not host.fc1.weight.requires_grad
    train(host, first, second)


def test_the_optimizer_state_can_be_saved_and_loaded_afterwards(
    host: nn.Module, grow: Callable, new_host: Callable
) -> None:
    optimizer = Adam(host.parameters())
    train(host, optimizer)
    widen_state({"main": optimizer}, grow(host).changes)
    wide = new_host(5)
    other = Adam(wide.parameters())
    wide.load_state_dict(host.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    x = torch.randn(16, 4)
    for model, mine in ((host, optimizer), (wide, other)):
        model.zero_grad()
        model(x).square().mean().backward()
        mine.step()
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), wide.parameters(), strict=True))


class RowScaled(SGD):
    """Keeps one number per row, as factored optimizers do."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = torch.ones(p.shape[0], 7)


def test_state_of_an_unknown_shape_is_refused_before_anything_changes(
    host: nn.Module, grow: Callable
) -> None:
    known = Adam([host.fc1.weight])
    unknown = RowScaled([p for p in host.parameters() if p is not host.fc1.weight], lr=0.1)
    train(host, known, unknown)
    widened = grow(host)
    with pytest.raises(
        SurgeryError,
        match=r"RowScaled 'odd': state 'rows' of 'fc1.bias' .*\(3, 7\).*\(3,\).*another optimizer",
    ):
        widen_state({"main": known, "odd": unknown}, widened.changes)
    assert known.state[host.fc1.weight]["exp_avg"].shape == (3, 4)
    widened.undo()
    train(host, known, unknown)


class Slow(SGD):
    """Keeps a copy of the weights, as look-ahead does, and a count in a tensor of one number."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()
                self.state[p]["seen"] = torch.full((1,), 7.0)


PLAN = WidenPlan(  # six rows in two chunks, as a fused layer has them, then a column; then a bias of one
    "fused",
    2,
    (
        WidenEdit("0.weight", 0, 6, 8, "", chunks=2),
        WidenEdit("0.weight", 1, 4, 5, ""),
        WidenEdit("1.bias", 0, 1, 3, ""),
    ),
    (),
)


def fused(
    make: Callable[..., Optimizer],
) -> tuple[nn.Module, Optimizer, dict[str, Tensor], tuple[Change, ...]]:
    """Widen two axes of one weight; returns also its state from before."""
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 1))
    optimizer = make(model.parameters())
    for _ in range(2):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(optimizer.state[model[0].weight])
    slices = {"0.weight": torch.rand(2, 4), "0.weight@1": torch.rand(8, 1), "1.bias": torch.rand(2)}
    return model, optimizer, before, widen(model, PLAN, slices).changes


def put_together(old: Tensor, rows: Tensor, column: Tensor) -> Tensor:
    """Old rows, a new one behind each half of them; then the column."""
    return torch.cat([torch.cat([old[:3], rows[:1], old[3:], rows[1:]]), column], 1)


def test_chunks_and_both_axes_are_filled_where_they_lie() -> None:
    model, optimizer, before, changes = fused(Adam)
    assert widen_state({"main": optimizer}, changes) == []
    zeros = torch.zeros(2, 4), torch.zeros(8, 1)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[model[0].weight][key], put_together(before[key], *zeros))
    assert optimizer.state[model[1].bias]["exp_avg"][1:].tolist() == [0.0, 0.0]


def test_the_mean_is_that_of_a_chunk() -> None:
    model, optimizer, before, changes = fused(Adam)
    widen_state({"main": optimizer}, changes, "mean")
    old = before["exp_avg"]
    rows = torch.stack([old[:3].mean(0), old[3:].mean(0)])
    column = put_together(old, rows, torch.zeros(8, 0)).mean(1, keepdim=True)
    torch.testing.assert_close(
        optimizer.state[model[0].weight]["exp_avg"], put_together(old, rows, column), rtol=0, atol=0
    )


def test_factors_follow_the_one_axis_that_each_has() -> None:
    """The mean over columns has rows only, and the mean over rows has columns only."""
    model, optimizer, before, changes = fused(Adafactor)
    widen_state({"main": optimizer}, changes)
    after = optimizer.state[model[0].weight]
    rows = before["row_var"]  # (6, 1), in two chunks
    halves = [torch.cat([half, half.mean(0, keepdim=True)]) for half in (rows[:3], rows[3:])]
    assert torch.equal(after["row_var"], torch.cat(halves))
    columns = before["col_var"]  # (1, 4)
    assert torch.equal(after["col_var"], torch.cat([columns, columns.mean(1, keepdim=True)], 1))


def test_a_seed_s_state_is_found_by_the_slice_s_key() -> None:
    model, optimizer, before, changes = fused(lambda ps: SGD(ps, lr=0.1, momentum=0.9))
    learned = {"0.weight": torch.rand(2, 4), "0.weight@1": torch.rand(8, 1), "1.bias": torch.rand(2)}
    donor = {key: {"momentum_buffer": value} for key, value in learned.items()}
    assert widen_state({"main": optimizer}, changes, "seed", donor) == []
    found = optimizer.state[model[0].weight]["momentum_buffer"]
    whole = put_together(before["momentum_buffer"], learned["0.weight"], learned["0.weight@1"])
    assert torch.equal(found, whole)


def test_a_seed_without_an_optimizer_of_its_own_is_told() -> None:
    _, optimizer, _, changes = fused(lambda ps: SGD(ps, lr=0.1, momentum=0.9))
    lines = widen_state({"main": optimizer}, changes, "seed")
    assert len(lines) == 3
    assert all("the seed has nothing for" in line for line in lines)


@pytest.mark.parametrize(
    ("make", "key"), [(lambda ps: Slow(ps, lr=0.1), "slow"), (lambda ps: ASGD(ps, lr=0.1), "ax")]
)
def test_the_average_of_a_unit_that_has_just_come_is_the_unit(make: Callable, key: str) -> None:
    model, optimizer, before, changes = fused(make)
    widen_state({"main": optimizer}, changes)
    weight = model[0].weight.detach()
    rows, column = weight[[3, 7], :4], weight[:, 4:]
    assert torch.equal(optimizer.state[model[0].weight][key], put_together(before[key], rows, column))
    assert torch.equal(optimizer.state[model[1].bias][key][1:], model[1].bias[1:])
    assert key == "ax" or optimizer.state[model[0].weight]["seen"].tolist() == [7.0]


def test_numbers_in_a_wrapper_of_their_own_are_refused() -> None:
    class Packed(Tensor):
        """Looks like a tensor of the parameter's shape, and is not written like one."""

    _, optimizer, _, changes = fused(lambda ps: SGD(ps, lr=0.1, momentum=0.9))
    for state in optimizer.state.values():
        state["packed"] = state["momentum_buffer"].as_subclass(Packed)
    with pytest.raises(SurgeryError, match=r"state 'packed' of '0.weight' is a Packed of shape \(6, 4\)"):
        widen_state({"main": optimizer}, changes)
