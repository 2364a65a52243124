"""Batches of every layout that loaders give, probes that can be read once, losses with gradients inside."""

from __future__ import annotations

import dataclasses
import random
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import esper
from esper.batches.examples import count_examples, split_batch, take
from esper.batches.known import rows_of
from esper.errors import EsperError, ProbeError
from tests.cases.loops import Task, cross_entropy, narrow, run, train


@dataclasses.dataclass
class Pair:
    """A batch as a dataclass."""

    x: Tensor
    y: Tensor


class Encoded(UserDict[str, Tensor]):
    """A batch as a tokenizer returns it."""


LAYOUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "list": (lambda x, y: (x, y.tolist()), lambda b: (b[0], torch.tensor(b[1]))),
    "numpy": (lambda x, y: (x, y.numpy()), lambda b: (b[0], torch.from_numpy(b[1]))),
    "dataclass": (Pair, lambda b: (b.x, b.y)),
    "UserDict": (lambda x, y: Encoded(x=x, y=y), lambda b: (b["x"], b["y"])),
    "nested": (lambda x, y: {"a": Pair(x, y), "k": 3}, lambda b: (b["a"].x, b["a"].y)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_any_layout(layout: str) -> None:
    made, read = LAYOUTS[layout]
    task, plain = Task(), Task()
    net, twin = narrow(), narrow()
    run(
        net,
        draw=lambda n=48: made(*task(n)),
        loss=lambda m, b: F.cross_entropy(m(read(b)[0]), read(b)[1]),
        probe=[made(*Task(7)(100)), made(*Task(8)(100))],  # joined
    )
    run(twin, draw=plain, probe=[Task(7)(100), Task(8)(100)])
    assert net[0].out_features > 1
    assert torch.equal(net[0].weight, twin[0].weight), "the same as a tuple of tensors"


def bags(n: int = 48) -> tuple[Tensor, ...]:
    """Draw a batch whose tensors differ in length."""
    y = torch.randint(10, (n,))
    return (y[:, None] * 5 + torch.randint(5, (n, 3))).flatten(), torch.arange(n) * 3, y


class Bag(nn.Module):
    """Reads indices and offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.b = nn.EmbeddingBag(50, 10), nn.Linear(10, 1), nn.Linear(1, 10)

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        """Return logits."""
        return self.b(torch.tanh(self.a(self.e(indices, offsets))))


@pytest.mark.parametrize(
    ("net", "loss", "probe"),
    [
        (Bag, lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]), lambda: [bags()]),
        (narrow, cross_entropy, lambda: [(torch.zeros(0, 10), torch.zeros(0, dtype=torch.long))]),
        (narrow, lambda m, b: cross_entropy(m, b["x"]), lambda: [{"name": "x"}]),
    ],
)
def test_what_is_no_probe_is_refused_at_the_start(net: Any, loss: Any, probe: Any) -> None:
    made = net()
    optimizer = torch.optim.Adam(made.parameters())
    with pytest.raises(ProbeError):
        esper.grow(made, optimizer, loss, probe=probe(), steps=60)
    assert not optimizer._optimizer_step_post_hooks, "nothing is left behind"
    assert not optimizer._optimizer_step_pre_hooks


class OneShot(IterableDataset[Any]):
    """Gives every batch once."""

    def __init__(self, count: int) -> None:
        draw = Task()
        self.left = iter([draw(64) for _ in range(count)])

    def __iter__(self) -> Iterator[Any]:
        """Return the same iterator each time."""
        return self.left


@pytest.mark.parametrize("count", [1, 100])
def test_a_one_shot_dataset_is_refused_at_the_start(count: int) -> None:
    with pytest.raises(ProbeError, match="one-shot"):
        run(narrow(), probe=DataLoader(OneShot(count), None))


class Endless(IterableDataset[Any]):
    """Never ends."""

    def __iter__(self) -> Iterator[Any]:
        """Draw for ever."""
        draw = Task()
        while True:
            yield draw(64)


def test_an_endless_probe_is_read_as_far_as_needed() -> None:
    assert run(narrow(), probe=DataLoader(Endless(), None)).growth.plans


def physics(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss with a gradient for its inputs inside."""
    x = batch[0].detach().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return F.cross_entropy(u, batch[1]) + 0.01 * slope.square().mean()


def test_gradients_inside_the_loss() -> None:
    net = narrow()
    ran = run(net, loss=physics)
    assert net[0].out_features > 1
    assert not any("skipped" in warning for warning in ran.warnings)


def test_a_run_that_does_not_begin_leaves_no_hook() -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(ZeroDivisionError):
        esper.grow(net, optimizer, cross_entropy, probe=[Task()(99)], steps=60, on_event=lambda event: 1 / 0)
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_random_streams_and_shared_generators_stay_where_they_are() -> None:
    draw, shared = Task(), torch.Generator().manual_seed(3)
    data = TensorDataset(*draw(200))
    probe = DataLoader(data, 64, shuffle=True, generator=shared)
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    ours, cpu, python = shared.get_state(), torch.get_rng_state(), random.getstate()
    numpy = np.random.get_state()[1].tolist()
    growth = esper.grow(net, optimizer, cross_entropy, probe=probe, steps=60)
    train(growth, net, optimizer, draw, 60)
    growth.finish()
    assert growth.plans
    assert torch.equal(ours, shared.get_state())
    assert torch.equal(cpu, torch.get_rng_state())
    assert python == random.getstate()
    assert numpy == np.random.get_state()[1].tolist()


def test_a_layer_of_complex_numbers_is_no_place() -> None:
    torch.manual_seed(0)
    whole = nn.Sequential(
        nn.Linear(10, 2, dtype=torch.cfloat), nn.Tanh(), nn.Linear(2, 10, dtype=torch.cfloat)
    )

    class Real(nn.Module):
        """Complex layers, then real ones."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = whole, narrow()

        def forward(self, x: Tensor) -> Tensor:
            """Return logits."""
            return self.second(self.first(x.to(torch.cfloat)).real)

    wrapped = esper.wrap(Real(), torch.randn(4, 10), blueprints=["widen"])
    assert list(wrapped.places) == ["second.0>second.2"]
    assert any("complex" in refusal.reason for refusal in wrapped.refusals)
    assert issubclass(ProbeError, EsperError)


class Sequences(nn.Module):
    """Reads a list of sequences of unlike length."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(10, 1), nn.Linear(1, 10)

    def forward(self, given: Any) -> Tensor:
        """Return logits."""
        parts = given.unbind() if isinstance(given, Tensor) else given
        return self.b(torch.tanh(self.a(torch.stack([one.sum(0) for one in parts]))))


def sequences(lengths: int = 5) -> Callable[[int], tuple[list[Tensor], Tensor]]:
    task, chance = Task(), random.Random(0)

    def draw(n: int = 48) -> tuple[list[Tensor], Tensor]:
        x, y = task(n)
        return [one.repeat(k, 1) / k for one in x for k in (chance.randint(1, lengths),)], y

    return draw


@pytest.mark.parametrize("lengths", [5, 1])
def test_a_list_of_sequences_has_an_example_in_each(lengths: int) -> None:
    net = Sequences()
    assert count_examples(sequences(lengths)(7)) == 7
    assert count_examples(sequences()(7)[0]) == 7, "nothing beside it"
    made = run(net, draw=sequences(lengths))
    assert net.a.out_features > 1
    assert not made.warnings


def test_a_batch_that_is_a_list_of_its_parts_is_none_of_examples() -> None:
    x, y = Task()(7)
    assert count_examples([x, y]) == 7
    assert count_examples([x, torch.zeros(3, 10), torch.zeros(4, 10)]) == 7
    assert count_examples([x, [torch.zeros(3, 2), torch.zeros(4, 2)]]) == 7, "a table of two"


@pytest.mark.parametrize("kind", [dict, Encoded])
def test_a_mapping_has_as_many_examples_as_its_first_part_that_tells(kind: type[dict[str, Any]]) -> None:
    x, y = Task()(7)
    for parts in ({"x": x, "y": y}, {"few": x[:3], "x": x}, {"scale": torch.tensor(2.0), "x": x}):
        assert count_examples(kind(parts)) == split_batch(kind(parts))[3]
    assert count_examples(kind(scale=torch.tensor(2.0), x=x)) == 7
    with pytest.raises(ProbeError, match="no tensor with a batch axis"):
        count_examples(kind())


def test_images_of_unlike_size_with_tables_beside_them() -> None:
    images = [torch.zeros(3, 5, k) for k in (4, 6, 5)]
    batch = images, [{"boxes": torch.zeros(k, 4)} for k in (1, 2, 9)]
    assert count_examples(batch) == 3
    few = take(batch, torch.tensor([2, 0]))
    assert [one.shape[-1] for one in few[0]] == [5, 4]
    assert [len(one["boxes"]) for one in few[1]] == [9, 1]
    assert len(rows_of(batch)[1]) == 3


@pytest.mark.parametrize(
    ("turned", "named"),
    [
        (lambda x: x.to_sparse(), "a sparse tensor"),
        (lambda x: x.to_sparse_csr(), "a sparse tensor"),
        (lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged), "a nested tensor"),
        (lambda x: torch.nested.nested_tensor([*x]), "a nested tensor"),
    ],
    ids=["coo", "csr", "jagged", "strided"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_which_no_examples_can_be_taken_are_refused_by_name(turned: Any, named: str) -> None:
    task = Task()

    def dense(model: nn.Module, batch: Any) -> Tensor:
        x = torch.stack(list(batch[0].unbind())) if batch[0].is_nested else batch[0].to_dense()
        return F.cross_entropy(model(x), batch[1])

    def draw(n: int = 48) -> Any:
        x, y = task(n)
        return turned(x), y

    with pytest.raises(ProbeError, match=named):
        run(narrow(), dense, draw)


def by_sample(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss with per-sample gradients of the weights."""

    def one(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])

    found = vmap(grad(one), in_dims=(None, 0, 0))(dict(model.named_parameters()), *batch)
    return cross_entropy(model, batch) + sum(g.square().mean() for g in found.values())


def by_input(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss with per-sample gradients of the inputs."""
    slopes = vmap(grad(lambda x: model(x).sum()))(batch[0])
    return cross_entropy(model, batch) + slopes.square().mean()


@pytest.mark.parametrize("mode", ["early", "incubate"])
@pytest.mark.parametrize(
    "loss", [by_sample, by_input, lambda m, b: F.cross_entropy(vmap(m)(b[0]), b[1])], ids=["p", "x", "all"]
)
def test_a_model_inside_torch_func_is_refused_by_name(loss: Any, mode: str) -> None:
    with pytest.raises(EsperError, match=r"inside torch\.func"):
        run(narrow(), loss, growth=mode)


def test_torch_func_beside_the_model_is_no_fault() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        y = model(batch[0])
        return F.cross_entropy(y, batch[1]) + 1e-3 * vmap(lambda row: row.square().sum())(y).mean()

    net = narrow()
    run(net, loss)
    assert net[0].out_features > 1
