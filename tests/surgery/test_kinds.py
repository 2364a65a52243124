"""What is special about some optimizers: factors, histories, averages, sparse gradients, AMP, a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import ASGD, LBFGS, Adafactor, Adam, Optimizer, SparseAdam

from esper.contracts import WidenEdit, WidenPlan
from esper.surgery.optimizers.kinds import KINDS, Kind, kind_of
from esper.surgery.optimizers.widening import widen_state
from esper.surgery.widen_layers import Widened, widen


def train(model: nn.Module, optimizer: Optimizer) -> None:
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()


@pytest.fixture
def grow(plan_of: Callable, slices_of: Callable) -> Callable[[nn.Module], Widened]:
    return lambda model: widen(model, plan_of(3, 5), slices_of(model, plan_of(3, 5)))


def test_what_is_special_and_where() -> None:
    shapes = [torch.empty(shape) for shape in ((2,), (2, 2), (2, 2, 2), (2, 2, 2, 2), ())]
    took = {name: [kind.takes(one) for one in shapes] for name, kind in KINDS.items()}
    assert took.pop("Muon") == [False, True, False, False, False]
    assert took.pop("SparseAdam") == [False] * 5
    assert set(map(tuple, took.values())) == {(True,) * 5}
    assert {name for name, kind in KINDS.items() if kind.history} == {"LBFGS"}
    assert {name for name, kind in KINDS.items() if kind.padded} == {"Adafactor"}
    assert {name for name, kind in KINDS.items() if kind.wants} == {"Muon", "SparseAdam"}
    assert KINDS["Adafactor"].reduced == {"row_var": -1, "col_var": -2}


def test_an_unknown_class_is_of_its_nearest_known_base_s_kind() -> None:
    class Unknown(Optimizer):
        pass

    class Smoothed(ASGD):
        pass

    parameters = [nn.Parameter(torch.zeros(2))]
    assert kind_of(Unknown(parameters, {})) == Kind("one number per weight, the new ones zero")
    assert kind_of(Smoothed(parameters)) is KINDS["ASGD"]
    assert kind_of(Adam(parameters)) is KINDS["Adam"]


@pytest.mark.parametrize("axis", [0, 1])
def test_factors_over_a_kernel_s_window_both_follow_its_channels(axis: int) -> None:
    """A convolution's moments are factored over height and width; both factors have every channel."""
    conv = nn.Conv2d(2, 3, (3, 2))
    optimizer = Adafactor(conv.parameters())
    conv(torch.randn(4, 2, 5, 5)).square().mean().backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[conv.weight].items()}
    old = conv.weight.shape[axis]
    plan = WidenPlan("conv", 2, (WidenEdit("weight", axis, old, old + 2, ""),), ())
    shape = list(conv.weight.shape)
    shape[axis] = 2
    widen_state({"main": optimizer}, widen(conv, plan, {"weight": torch.zeros(shape)}).changes)
    for key, size in (("row_var", 3), ("col_var", 2)):
        new = optimizer.state[conv.weight][key]
        assert new.shape == (*conv.weight.shape[:2], *((size, 1) if key == "row_var" else (1, size)))
        kept, fresh = new.split([old, 2], axis)
        assert torch.equal(kept, before[key])
        assert torch.equal(fresh, before[key].mean(axis, keepdim=True).expand_as(fresh))


def test_factors_of_one_unit_are_told_apart(new_host: Callable, plan_of: Callable,
                                            slices_of: Callable) -> None:  # fmt: skip
    """With one row a factor over columns has the shape of the whole matrix."""
    narrow = new_host(1)
    optimizer = Adafactor(narrow.parameters())
    train(narrow, optimizer)
    column = optimizer.state[narrow.fc1.weight]["col_var"].clone()
    plan = plan_of(1, 3)
    widen_state({"main": optimizer}, widen(narrow, plan, slices_of(narrow, plan)).changes)
    assert torch.equal(optimizer.state[narrow.fc1.weight]["col_var"], column)
    assert optimizer.state[narrow.fc1.weight]["row_var"].shape == (3, 1)
    train(narrow, optimizer)


def test_the_old_units_go_on_as_they_would_have_with_adafactor(host: nn.Module, grow: Callable) -> None:
    """The estimate of the variance is a product of factors over their mean, which must not move."""
    optimizer = Adafactor(host.parameters())
    train(host, optimizer)

    def estimate() -> torch.Tensor:
        state = optimizer.state[host.fc1.weight]
        return state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True)

    before = estimate()
    widen_state({"main": optimizer}, grow(host).changes)
    torch.testing.assert_close(estimate()[:3], before)


def test_lbfgs_starts_anew_and_goes_on_down(host: nn.Module, grow: Callable) -> None:
    optimizer = LBFGS(host.parameters(), max_iter=8, line_search_fn="strong_wolfe")
    x = torch.randn(32, 4)
    losses: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (host(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        return loss

    losses += [float(optimizer.step(closure).detach()) for _ in range(2)]
    blocker = weakref.ref(host.fc1.weight)  # the first parameter, under which the history is kept
    (line,) = widen_state({"main": optimizer}, grow(host).changes)
    assert "LBFGS 'main': its history spans all parameters at once; it starts anew" in line
    assert blocker() is not host.fc1.weight
    losses += [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert optimizer.state[host.fc1.weight]["n_iter"] > 0
    fresh = LBFGS(host.parameters())
    assert widen_state({"main": fresh}, ()) == []


def test_the_average_of_a_new_unit_is_the_unit_itself(host: nn.Module, grow: Callable) -> None:
    optimizer = ASGD(host.parameters(), t0=1)
    train(host, optimizer)
    old = optimizer.state[host.fc1.weight]["ax"].clone()
    widen_state({"main": optimizer}, grow(host).changes, "mean")
    assert torch.equal(optimizer.state[host.fc1.weight]["ax"], torch.cat([old, host.fc1.weight[3:].detach()]))


def test_a_lookup_with_sparse_gradients_can_get_wider() -> None:
    words = nn.Embedding(5, 2, sparse=True)
    optimizer = SparseAdam(words.parameters())

    def step() -> None:
        words.zero_grad()
        words(torch.tensor([1, 3])).square().sum().backward()
        optimizer.step()

    step()
    before = optimizer.state[words.weight]["exp_avg"].clone()
    edits = (WidenEdit("weight", 1, 2, 3, ""),)
    plan = WidenPlan("words", 1, edits, (("", "embedding_dim", 3),))
    widen_state({"main": optimizer}, widen(words, plan, {"weight": torch.ones(5, 1)}).changes)
    after = optimizer.state[words.weight]["exp_avg"]
    assert torch.equal(after[:, :2], before)
    assert not after[:, 2:].any()
    step()


def test_seed_brings_the_factors_it_learned(host: nn.Module, grow: Callable) -> None:
    optimizer = Adafactor(host.parameters())
    train(host, optimizer)
    donor = {"fc1.weight": {"row_var": torch.full((2, 1), 7.0), "col_var": torch.ones(1, 4)}}
    reasons = widen_state({"main": optimizer}, grow(host).changes, "seed", donor)
    assert optimizer.state[host.fc1.weight]["row_var"][3:].eq(7).all()
    assert not any("fc1.weight" in reason for reason in reasons)


def test_amp_goes_on_and_a_skipped_step_stays_skipped(host: nn.Module, grow: Callable) -> None:
    optimizer = Adam(host.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

    def step(fault: float = 1.0) -> bool:
        before = host.fc1.weight.clone()
        optimizer.zero_grad()
        loss = host(torch.randn(16, 4)).square().mean() * fault
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(host.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        return not torch.equal(before, host.fc1.weight)

    assert step()
    assert not step(float("inf"))
    widen_state({"main": optimizer}, grow(host).changes)
    assert step()
    assert not step(float("inf"))
    assert scaler.get_scale() == 2.0


def test_what_torch_itself_refuses() -> None:
    """Differentiable steps need parameters that are no leaves, capturable ones a device with graphs."""
    for option, error, said in (
        ("differentiable", RuntimeError, "leaf Variable"),
        ("capturable", AssertionError, "supported devices"),
    ):
        layer = nn.Linear(2, 2)
        optimizer = Adam(layer.parameters(), **{option: True})
        layer(torch.randn(3, 2)).sum().backward()
        with pytest.raises(error, match=said):
            optimizer.step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{"capturable": True}, {"fused": True}, {"foreach": True}])
def test_what_only_a_gpu_has_follows_too(new_host: Callable, grow: Callable, options: dict[str, Any]) -> None:
    host = new_host().cuda()
    optimizer = Adam(host.parameters(), amsgrad=True, **options)

    def step() -> None:
        host.zero_grad()
        host(torch.randn(16, 4, device="cuda")).square().mean().backward()
        optimizer.step()

    step()
    old = {key: value.clone() for key, value in optimizer.state[host.fc1.weight].items()}
    widen_state({"main": optimizer}, grow(host).changes)
    for key, value in optimizer.state[host.fc1.weight].items():
        assert torch.equal(value[:3] if value.dim() else value, old[key])
        assert value.device == old[key].device
    step()
    assert all(p.isfinite().all() for p in host.parameters())
