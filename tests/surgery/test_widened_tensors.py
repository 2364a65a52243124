"""What widening does to tensors: shapes asked for, empty slices, chunks, memory formats, and the way back."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from esper.contracts import WidenEdit, WidenPlan
from esper.errors import SurgeryError
from esper.surgery.widen_layers import (
    Holders,
    asked,
    empty_slices,
    extend,
    extended,
    like,
    put_in_place,
    widen,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def both_axes() -> WidenPlan:
    """The middle layer grows by two inputs, then by one output."""
    edits = (
        WidenEdit("0.weight", 0, 4, 6, ""),
        WidenEdit("0.bias", 0, 4, 6, ""),
        WidenEdit("2.weight", 1, 4, 6, ""),
        WidenEdit("2.weight", 0, 4, 5, ""),
        WidenEdit("2.bias", 0, 4, 5, ""),
        WidenEdit("4.weight", 1, 4, 5, ""),
    )
    return WidenPlan("0>2", 2, edits, (("0", "out_features", 6), ("2", "in_features", 6)))


SHAPES = [[2, 3], [2], [4, 2], [1, 6], [1], [2, 1]]  # each as the edits before it left the tensor


def test_slices_have_the_shape_that_earlier_edits_leave() -> None:
    model, plan = net(), both_axes()
    keys = [key for key, _ in plan.keyed()]
    assert asked(Holders(model), plan) == dict(zip(keys, SHAPES, strict=True))
    model.double()
    slices = empty_slices(model, plan)
    assert {key: list(one.shape) for key, one in slices.items()} == dict(zip(keys, SHAPES, strict=True))
    assert all(one.dtype == torch.float64 and not one.any() for one in slices.values())


def test_a_tensor_that_grows_along_two_axes_is_one_change_and_looked_at_first() -> None:
    model, plan = net(), both_axes()
    slices = {
        key: torch.full_like(one, i + 1.0) for i, (key, one) in enumerate(empty_slices(model, plan).items())
    }
    old = model[2].weight.detach().clone()
    seen = extended(model, plan, slices)
    assert [tuple(one.shape) for one in seen.values()] == [(6, 3), (6,), (5, 6), (5,), (2, 5)]
    assert model[2].weight.shape == (4, 4)
    widened = widen(model, plan, slices)
    assert [(c.edit.name, len(c.edits)) for c in widened.changes] == [
        ("0.weight", 1),
        ("0.bias", 1),
        ("2.weight", 2),
        ("2.bias", 1),
        ("4.weight", 1),
    ]
    assert all(c.previous is c.parameter for c in widened.changes)
    weight = model[2].weight
    assert torch.equal(weight[:4, :4], old)
    assert weight[:4, 4:].eq(3).all()
    assert weight[4:].eq(4).all()
    assert (model[0].out_features, model[2].in_features) == (6, 6)


def test_each_chunk_grows_behind_its_own_part() -> None:
    """A fused layer: 1 2 | 3 4 with 8 | 9 becomes 1 2 8 | 3 4 9."""
    old, new = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[8, 9]])
    assert extend(old, new, 1, 2).tolist() == [[1.0, 2.0, 8.0, 3.0, 4.0, 9.0]]
    assert extend(old, new, 1).tolist() == [[1.0, 2.0, 3.0, 4.0, 8.0, 9.0]]
    assert extend(old, new, 1).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 2, 3, 3), torch.channels_last), ((3, 2, 3, 3, 3), torch.channels_last_3d)],
)
def test_memory_formats_stay(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    plain = torch.randn(shape)
    more = torch.randn(1, *shape[1:])
    assert extend(plain, more, 0).is_contiguous()
    last = extend(plain.to(memory_format=layout), more, 0)
    assert last.is_contiguous(memory_format=layout)
    assert not last.is_contiguous()
    assert torch.equal(last, torch.cat([plain, more]))
    single = torch.randn(3, 1, *shape[2:])  # contiguous in both formats
    grown = extend(single, torch.randn(3, 1, *shape[2:]), 1)
    assert grown.is_contiguous()


@pytest.mark.parametrize("old_new_chunks", [(4, 6, 0), (4, 7, 2), (4, 6, 3), (4, 6, 4)])
def test_parts_that_are_not_equal_are_refused(old_new_chunks: tuple[int, int, int]) -> None:
    old, new, chunks = old_new_chunks
    edit = WidenEdit("0.bias", 0, old, new, "", chunks=chunks)
    with pytest.raises(SurgeryError, match=f"from 4 to {new} in {chunks} equal parts"):
        extended(net(), WidenPlan("0>2", 2, (edit,), ()), {"0.bias": torch.zeros(new - old)})


@pytest.mark.parametrize(("axis", "old", "new"), [(-1, 3, 4), (2, 3, 4), (0, 5, 6), (0, 4, 4), (0, 4, 3)])
def test_an_edit_that_does_not_fit_its_tensor_is_refused(axis: int, old: int, new: int) -> None:
    edit = WidenEdit("0.weight", axis, old, new, "")
    with pytest.raises(SurgeryError, match=r"its shape is \(4, 3\); plan the widening again"):
        extended(net(), WidenPlan("0>2", 1, (edit,), ()), {"0.weight": torch.zeros(1, 3)})


def test_what_is_tied_is_told_by_all_its_names() -> None:
    model = net()
    model.alias = model[0]
    assert Holders(model).tied == {}  # one owner under two names
    model[4].bias = model[2].bias
    assert Holders(model).tied == {name: ["2.bias", "4.bias"] for name in ("2.bias", "4.bias")}
    bare = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    assert Holders(bare).tied == {}  # what neither has is not tied


# -- the way back to earlier shapes --


class Kept(nn.Module):
    """A recurrent layer, a plain one and a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.rnn, self.out = nn.LSTM(3, width, batch_first=True), nn.Linear(width, 2)
        self.register_buffer("scale", torch.rand(width))
        self.register_buffer("fixed", torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.rnn(x)[0][:, -1] * self.scale) * self.fixed
        return found


def recurrent_plan() -> WidenPlan:
    """From four units to five."""
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]
    edits = [WidenEdit(f"rnn.{n}", 0, 16, 20, "", chunks=4) for n in names]
    edits += [
        WidenEdit("rnn.weight_hh_l0", 1, 4, 5, ""),
        WidenEdit("out.weight", 1, 4, 5, ""),
        WidenEdit("scale", 0, 4, 5, ""),
    ]
    return WidenPlan("rnn>out", 1, tuple(edits), (("rnn", "hidden_size", 5), ("out", "in_features", 5)))


def test_earlier_weights_come_back_whatever_their_shapes() -> None:
    model, earlier, x = Kept(5), Kept(4), torch.randn(2, 6, 3)
    held = dict(model.named_parameters())
    storage = {"fixed": model.fixed.data_ptr(), "out.bias": model.out.bias.data_ptr()}
    model.out.weight.grad = torch.ones_like(model.out.weight)
    given = {n: t.clone() for n, t in earlier.state_dict().items()}
    put_in_place(model, given)
    model.rnn.hidden_size = 4
    assert all(p is held[n] and p.requires_grad for n, p in model.named_parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, earlier.state_dict()[name])
        assert tensor.data_ptr() != given[name].data_ptr()
    assert model.out.weight.grad is None
    # what had the shape already is written in its place
    assert (model.fixed.data_ptr(), model.out.bias.data_ptr()) == (storage["fixed"], storage["out.bias"])
    assert torch.equal(model(x), earlier(x))
    assert all(a() is b for a, b in zip(model.rnn._flat_weight_refs, model.rnn._flat_weights, strict=True))
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_a_loss_that_is_still_held_keeps_no_recurrent_layer_from_going_back() -> None:
    """Its graph holds what adds up gradients, which knows the shape it was made for."""
    model, earlier, x = Kept(5), Kept(4), torch.randn(2, 6, 3)
    held = model(x).sum()
    held.backward()
    put_in_place(model, earlier.state_dict())
    model.rnn.hidden_size = 4
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    plan = recurrent_plan()
    widened = widen(model, plan, empty_slices(model, plan))
    again = model(x).sum()
    again.backward()
    widened.undo()
    model.zero_grad()
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    assert held.requires_grad
    assert again.requires_grad


def test_earlier_weights_come_back_under_every_name_that_a_module_has() -> None:
    model, earlier = net(), net()
    for one in (model, earlier):
        one.alias = one[0]
    with torch.no_grad():
        earlier[0].weight.fill_(7.0)
    put_in_place(model, earlier.state_dict())
    assert model.alias.weight is model[0].weight
    assert model[0].weight.eq(7.0).all()


def test_a_view_of_the_parameter_sees_what_is_written_over_the_same_shape() -> None:
    model, earlier = net(), net()
    with torch.no_grad():
        earlier[0].weight.fill_(7.0)
    seen = model[0].weight.detach()
    put_in_place(model, {"0.weight": earlier[0].weight.detach()})
    assert seen.eq(7.0).all()


def test_a_buffer_that_is_not_there_takes_a_copy() -> None:
    model = nn.BatchNorm1d(2)
    model.register_buffer("late", None)
    given = torch.ones(3)
    put_in_place(model, {"late": given})
    given.zero_()
    assert model.late.tolist() == [1.0, 1.0, 1.0]


def test_a_copy_is_one_of_its_own() -> None:
    one = torch.ones(2)
    for other in (None, torch.zeros(3)):
        copied = like(one, other)
        assert torch.equal(copied, one)
        assert copied.data_ptr() != one.data_ptr()


def test_recurrent_layers_grow_in_place_and_come_back() -> None:
    """Their own weak references would block the swap."""
    model, x = Kept(4), torch.randn(2, 6, 3)
    before = model(x).detach()
    plan = recurrent_plan()
    widened = widen(model, plan, empty_slices(model, plan))
    assert widened.replaced == ()
    assert torch.allclose(model(x), before, atol=1e-6)
    assert all(a() is b for a, b in zip(model.rnn._flat_weight_refs, model.rnn._flat_weights, strict=True))
    with torch.no_grad():
        widened.undo()
        assert torch.equal(model(x), before)
    assert all(a() is b for a, b in zip(model.rnn._flat_weight_refs, model.rnn._flat_weights, strict=True))
    assert (model.rnn.hidden_size, model.out.in_features, model.scale.shape) == (4, 4, (4,))


def test_a_new_parameter_has_the_hooks_of_the_one_whose_place_it_takes() -> None:
    model, seen = net(), list[tuple[int, ...]]()
    old = model[0].bias
    old.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    old.register_post_accumulate_grad_hook(lambda one: seen.append(tuple(one.shape)))
    held = weakref.ref(old)
    plan = WidenPlan("0>2", 2, both_axes().edits[:3], both_axes().attributes)
    widened = widen(model, plan, empty_slices(model, plan))
    (change,) = widened.replaced
    assert change.previous is old is held()
    assert change.parameter.requires_grad
    model(torch.randn(2, 3)).sum().backward()
    assert seen == [(6,), (6,)]
    assert change.why
