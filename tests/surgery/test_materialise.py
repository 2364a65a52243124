"""Widening in place, against models that hold what users hold: losses, lists, hooks, optimizers, ties."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from esper.contracts import WidenEdit, WidenPlan
from esper.errors import SurgeryError
from esper.surgery.widen_layers import Widened, extended, widen


class Net(nn.Module):
    """A convolution pair with everything between, a linear pair behind it, and a tied pair elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3)
        self.bn = nn.BatchNorm2d(3)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.fc1 = nn.Linear(4 * 4, 5)
        self.fc2 = nn.Linear(5, 6)
        self.embed = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.bn(self.conv1(x))))
        x = self.fc2(torch.relu(self.fc1(torch.relu(self.conv2(x)).flatten(1))))
        return self.head(torch.relu(self.embed(x)))


def conv_plan(old: int, new: int) -> WidenPlan:
    shapes = [
        ("conv1.weight", 0),
        ("conv1.bias", 0),
        ("bn.weight", 0),
        ("bn.bias", 0),
        ("bn.running_mean", 0),
    ]
    shapes += [("bn.running_var", 0), ("depthwise.weight", 0), ("depthwise.bias", 0), ("conv2.weight", 1)]
    edits = tuple(WidenEdit(name, axis, old, new, "") for name, axis in shapes)
    attributes = [("conv1", "out_channels"), ("bn", "num_features"), ("conv2", "in_channels")]
    attributes += [("depthwise", "in_channels"), ("depthwise", "out_channels"), ("depthwise", "groups")]
    return WidenPlan("conv1>conv2", new - old, edits, tuple((m, a, new) for m, a in attributes))


def linear_plan(old: int, new: int) -> WidenPlan:
    edits = [("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)]
    return WidenPlan(
        "fc1>fc2",
        new - old,
        tuple(WidenEdit(name, axis, old, new, "") for name, axis in edits),
        (("fc1", "out_features", new), ("fc2", "in_features", new)),
    )


def slices_for(model: nn.Module, plan: WidenPlan, **fills: float) -> dict[str, Tensor]:
    """Random new parts; consumers (axis 1) get zeros, so that the function stays the same."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    slices = {}
    for edit in plan.edits:
        shape = list(named[edit.name].shape)
        shape[edit.axis] = edit.new - edit.old
        slices[edit.name] = torch.zeros(shape) if edit.axis == 1 else torch.rand(shape) + 0.5
    return slices


def batch() -> Tensor:
    return torch.randn(7, 1, 6, 6)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def grow(model: nn.Module, plan: WidenPlan) -> Widened:
    return widen(model, plan, slices_for(model, plan))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("plan", [conv_plan(3, 7), linear_plan(5, 9)], ids=["conv", "linear"])
def test_zero_consumer_slices_leave_the_function_unchanged(net: Net, plan: WidenPlan, training: bool) -> None:
    net.train(training)
    x = batch()
    with torch.no_grad():
        before = copy.deepcopy(net)(x)
        grow(net, plan)
        after = net(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_old_parts_are_bit_identical_and_new_parts_are_the_slices(net: Net) -> None:
    before, plan = frozen_state(net), conv_plan(3, 7)
    slices = slices_for(net, plan)
    widen(net, plan, slices)
    after = net.state_dict()
    assert list(after) == list(before)
    for edit in plan.edits:
        old, new = after[edit.name].split([edit.old, edit.new - edit.old], edit.axis)
        assert torch.equal(old, before[edit.name])
        assert torch.equal(new, slices[edit.name])
    for name in set(before) - {edit.name for edit in plan.edits}:
        assert torch.equal(after[name], before[name])
    assert (net.conv1.out_channels, net.bn.num_features, net.depthwise.groups, net.conv2.in_channels) == (
        7,
        7,
        7,
        7,
    )


def test_three_times_in_a_row_everything_users_hold_goes_on_working(net: Net) -> None:
    held = list(net.parameters())
    optimizer = torch.optim.SGD(held, lr=0.01)
    for plan in (conv_plan(3, 5), linear_plan(5, 8), conv_plan(5, 6)):
        loss = net(batch()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        widened = grow(net, plan)  # while `loss` is alive
        assert widened.replaced == ()
        assert all(change.parameter.grad is None for change in widened.changes)
    assert all(mine is theirs for mine, theirs in zip(held, net.parameters(), strict=True))
    assert net.head.weight is net.embed.weight
    net(batch()).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in held)
    before = frozen_state(net)
    optimizer.step()
    unmoved = [n for n, p in net.named_parameters() if torch.equal(p, before[n])]
    assert set(unmoved) <= {"conv1.bias"}  # BatchNorm takes the gradient of a bias before it away


def test_a_held_loss_of_before_says_why_it_cannot_be_used_again(net: Net) -> None:
    """Torch poisons the old gradient accumulators: the gradient could only get lost."""
    x = net.fc1(torch.randn(2, 16)).sum()
    x.backward()
    again = net.fc1.bias.sum()  # shares the accumulator, saves no tensor
    grow(net, linear_plan(5, 6))
    with pytest.raises(RuntimeError, match="poisoned by swap_tensors"):
        again.backward()


def test_undo_restores_bits_storage_gradients_and_attributes(net: Net) -> None:
    loss = net(batch()).square().mean()
    loss.backward()
    before, pointers = frozen_state(net), {n: p.data_ptr() for n, p in net.named_parameters()}
    gradients = {n: p.grad for n, p in net.named_parameters()}
    buffers = dict(net.named_buffers())
    held = list(net.parameters())

    widened = grow(net, conv_plan(3, 7))
    with torch.no_grad():
        net.eval()(batch())
    widened.undo()
    widened.undo()

    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert {n: p.data_ptr() for n, p in net.named_parameters()} == pointers
    assert all(p.grad is gradients[n] for n, p in net.named_parameters())
    assert all(b is buffers[n] for n, b in net.named_buffers())
    assert all(mine is theirs for mine, theirs in zip(held, net.parameters(), strict=True))
    assert (net.conv1.out_channels, net.bn.num_features, net.depthwise.groups) == (3, 3, 3)
    net.train()(batch()).square().mean().backward()  # although `loss` is still held


def test_undo_after_a_check_that_kept_its_graph_keeps_identity(net: Net) -> None:
    held, before = list(net.eval().parameters()), frozen_state(net)
    widened = grow(net, linear_plan(5, 9))
    kept = net(batch())  # with a graph that has saved the widened weights
    widened.undo()
    assert all(mine is theirs for mine, theirs in zip(held, net.parameters(), strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    del kept
    net(batch()).sum().backward()


@pytest.mark.parametrize("holder", ["weak reference", "saved by a live graph", "view"])
def test_where_torch_refuses_the_swap_a_new_parameter_takes_the_place(net: Net, holder: str) -> None:
    old, other = net.fc2.weight, net.fc1.weight
    old.note = "kept"
    held = {
        "weak reference": lambda: weakref.ref(old),
        "saved by a live graph": lambda: net.fc2(torch.randn(2, 5, requires_grad=True)),
        "view": lambda: old.view(-1),
    }[holder]()
    gradient = old.grad = torch.ones_like(old)

    widened = grow(net, linear_plan(5, 9))

    (change,) = widened.replaced
    assert change.replaced is old
    assert change.previous is old
    assert change.parameter is net.fc2.weight
    assert change.parameter is not old
    assert change.parameter.note == "kept"
    assert change.why
    assert net.fc1.weight is other
    assert old.shape == (6, 5)
    assert old.grad is gradient
    net(batch()).sum().backward()
    widened.undo()
    assert net.fc2.weight is old
    assert held is not None


def test_hooks_and_attributes_stay_with_the_parameter(net: Net) -> None:
    seen: list[str] = []
    weight = net.fc1.weight
    weight.note = "kept"
    before = weight.register_hook(lambda gradient: seen.append(f"hook {tuple(gradient.shape)}"))
    after = weight.register_post_accumulate_grad_hook(lambda p: seen.append(f"post {tuple(p.grad.shape)}"))
    widened = grow(net, linear_plan(5, 9))
    net(batch()).sum().backward()
    assert seen == ["hook (9, 16)", "post (9, 16)"]
    assert weight.note == "kept"
    weight.grad = None
    widened.undo()
    net(batch()).sum().backward()
    assert seen[2:] == ["hook (5, 16)", "post (5, 16)"]
    before.remove()
    after.remove()
    net(batch()).sum().backward()
    assert len(seen) == 4


def test_dtype_memory_format_and_frozen_parameters_are_kept(net: Net) -> None:
    net.to(torch.float64).to(memory_format=torch.channels_last)
    net.conv1.weight.requires_grad_(False)
    grow(net, conv_plan(3, 7))
    for module in (net.conv1, net.depthwise, net.conv2):
        weight = module.weight
        assert weight.dtype == torch.float64
        assert weight.stride() == weight.detach().clone(memory_format=torch.channels_last).stride()
    assert not net.conv1.weight.requires_grad
    assert net.conv1.bias.requires_grad
    assert net.bn.running_mean.dtype == torch.float64


def test_a_module_under_two_names_is_no_obstacle() -> None:
    first = nn.Linear(2, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(3, 1))
    model.alias = first
    edits = (
        WidenEdit("0.weight", 0, 3, 4, ""),
        WidenEdit("0.bias", 0, 3, 4, ""),
        WidenEdit("2.weight", 1, 3, 4, ""),
    )
    grow(model, WidenPlan("0>2", 1, edits, (("0", "out_features", 4), ("2", "in_features", 4))))
    assert model.alias.weight is model[0].weight
    assert model.alias.weight.shape == (4, 2)
    by_alias = WidenPlan("alias", 1, (WidenEdit("alias.bias", 0, 4, 5, ""),), ())
    wide = extended(model, by_alias, {"alias.bias": torch.ones(1)})
    assert torch.equal(wide["alias.bias"], torch.cat([first.bias, torch.ones(1)]))
    widen(model, by_alias, {"alias.bias": torch.ones(1)})
    assert model[0].bias is first.bias
    assert torch.equal(first.bias, wide["alias.bias"])


def test_a_graph_that_nobody_holds_is_collected_before_a_swap_is_given_up(net: Net) -> None:
    cycle: list[object] = [net.fc2(torch.randn(2, 5, requires_grad=True))]  # saves the weight
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        assert grow(net, linear_plan(5, 9)).replaced == ()
    finally:
        gc.enable()


def faulty(**changes: object) -> tuple[WidenPlan, str | None]:
    good = linear_plan(5, 9)
    edits, attributes = list(good.edits), list(good.attributes)
    drop = changes.get("drop")
    if "edit" in changes:
        edits[2] = WidenEdit(*changes["edit"])  # type: ignore[misc]
    if "attribute" in changes:
        attributes[1] = changes["attribute"]  # type: ignore[call-overload]
    return WidenPlan("fc1>fc2", 4, tuple(edits), tuple(attributes)), drop  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (faulty(edit=("fc3.weight", 1, 5, 9, "")), r"no such tensor; did you mean 'fc\d.weight'"),
        (faulty(edit=("fc2.weight", 1, 4, 9, "")), r"its shape is \(6, 5\)"),
        (faulty(edit=("fc2.weight", 2, 5, 9, "")), r"along axis 2: its shape"),
        (faulty(edit=("fc2.weight", 1, 5, 5, "")), r"from 5 to 5"),
        (faulty(edit=("fc1.bias", 0, 5, 9, "")), "names a tensor twice"),
        (faulty(edit=("head.weight", 1, 6, 9, "")), "tied parameter: embed.weight and head.weight"),
        (faulty(attribute=("fc9", "in_features", 9)), "'in_features' of 'fc9'.*did you mean 'fc"),
        (faulty(attribute=("fc2", "in_channels", 9)), "'in_channels' of 'fc2'"),
        (faulty(drop="fc2.weight"), "no new slice given for 'fc2.weight'; given: fc1.weight, fc1.bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused_before_anything_changes(
    net: Net, plan: tuple[WidenPlan, str | None], message: str
) -> None:
    before = frozen_state(net)
    slices = slices_for(net, linear_plan(5, 9)) | {"head.weight": torch.zeros(6, 3)}
    if plan[1]:
        del slices[plan[1]]
    with pytest.raises(SurgeryError, match=message):
        widen(net, plan[0], slices)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert (net.fc1.out_features, net.fc2.in_features) == (5, 5)


def test_a_slice_of_the_wrong_shape_and_a_parameter_of_another_kind_are_refused(net: Net) -> None:
    plan = linear_plan(5, 9)
    with pytest.raises(SurgeryError, match=r"slice of 'fc2.weight' has shape \(6, 3\); \(6, 4\) is needed"):
        widen(net, plan, slices_for(net, plan) | {"fc2.weight": torch.zeros(6, 3)})

    class Special(nn.Parameter):
        pass

    net.fc2.weight = Special(net.fc2.weight.detach())
    with pytest.raises(SurgeryError, match="it is a Special; only a plain Parameter"):
        grow(net, plan)


def test_an_exception_on_the_way_puts_everything_back(net: Net) -> None:
    class Stubborn(nn.Linear):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "in_features" and "in_features" in self.__dict__:
                raise ValueError("I will not change")
            super().__setattr__(name, value)

    net.fc2 = Stubborn(5, 6)
    before, held = frozen_state(net), list(net.parameters())
    with pytest.raises(ValueError, match="I will not change"):
        grow(net, linear_plan(5, 9))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(mine is theirs for mine, theirs in zip(held, net.parameters(), strict=True))
    assert net.fc1.out_features == 5
