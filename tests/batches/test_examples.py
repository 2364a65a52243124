"""What is an example of a batch, value by value: counted, taken, copied, halved and joined."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper.batches.examples import (
    copied,
    count_examples,
    example_losses,
    join,
    refuse_layouts,
    smaller,
    split_batch,
    take,
)
from esper.batches.layout import PARTS
from esper.errors import ProbeError


@dataclasses.dataclass
class Pair:
    """A batch as a dataclass."""

    x: Tensor
    y: Any


def rows(n: int, width: int = 2) -> Tensor:
    """Rows that can be told apart."""
    return torch.arange(n * width, dtype=torch.float32).reshape(n, width)


def unlike(n: int) -> list[Tensor]:
    """Sequences of unlike length."""
    return [torch.arange(float(i + 1)) for i in range(n)]


COUNTED: dict[str, tuple[Any, int, list[bool]]] = {
    "a tensor": (rows(5), 5, [True]),
    "a tuple": ((rows(4), torch.arange(4)), 4, [True, True]),
    "a list": ([rows(3), torch.arange(3)], 3, [True, True]),
    "what has no examples": ((rows(4), torch.ones(3), 0.5, "x", torch.tensor(1.0)), 4, [True] + [False] * 4),
    "a number first": ((torch.tensor(1.0), rows(4)), 4, [False, True]),
    "a dict": ({"x": rows(4), "w": torch.ones(3)}, 4, [True, False]),
    "a dict with a word first": ({"name": "x", "x": rows(4)}, 4, [False, True]),
    "another mapping": (UserDict(x=rows(4), w=torch.ones(3)), 4, [True, False]),
    "a dataclass": (Pair(rows(6), [1, 2, 3, 4, 5, 6]), 6, [True, True]),
    "labels that are more": (([1, 2, 3, 4, 5], rows(4)), 4, [False, True]),
    "an array": ({"x": np.zeros((3, 2)), "y": np.zeros(())}, 3, [True, False]),
    "an array first": ((np.zeros((3, 2)), rows(3)), 3, [True, True]),
    "sequences": (unlike(PARTS + 1), PARTS + 1, [True]),
    "labels and sequences": ((["a", "b", "c"], {"s": unlike(3)}), 3, [True, True]),
    "a tuple of many": (tuple(rows(7) for _ in range(PARTS + 1)), 7, [True] * (PARTS + 1)),
}


@pytest.mark.parametrize("case", COUNTED)
def test_examples_are_counted_and_what_has_them_is_known(case: str) -> None:
    batch, count, batched = COUNTED[case]
    assert count_examples(batch) == count
    leaves, found, _, again = split_batch(batch)
    assert (found, again, len(leaves)) == (batched, count, len(batched))


@pytest.mark.parametrize(
    ("batch", "kinds"),
    [
        ((), "nothing"),
        ({}, "nothing"),
        ([1, 2, 3], "list"),
        ({"y": ["a", "b"], "k": 3, "m": torch.tensor(1.0)}, "Tensor, int, list"),
    ],
)
def test_a_batch_that_tells_no_number_of_examples_is_refused(batch: Any, kinds: str) -> None:
    for asked in (count_examples, split_batch):
        with pytest.raises(ProbeError, match=f"no tensor with a batch axis, but {kinds}; evidence needs"):
            asked(batch)


def test_only_layouts_with_examples_in_them_are_refused() -> None:
    eye = torch.eye(3).to_sparse()
    for fine in ((rows(3), "x", None), (rows(4), eye), (eye.to_dense(), rows(3))):
        refuse_layouts(fine)
    with pytest.raises(ProbeError, match=r"a sparse tensor \(torch.sparse_coo\) with a row for each example"):
        refuse_layouts((rows(3), "x", eye))
    nested = torch.nested.nested_tensor(unlike(3), layout=torch.jagged)
    with pytest.raises(ProbeError, match="a nested tensor"):
        refuse_layouts((rows(3), nested))


def test_some_examples_are_taken_in_the_order_given() -> None:
    weight, odd = torch.ones(3), object()
    batch = (rows(4), {"y": ["a", "b", "c", "d"], "w": weight}, np.arange(4), odd, unlike(4))
    x, named, array, other, series = take(batch, torch.tensor([2, 0]))  # type: ignore[misc]
    assert x.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    assert (named["y"], array.tolist()) == (["c", "a"], [2, 0])
    assert named["w"] is weight
    assert other is odd
    assert [len(one) for one in series] == [3, 1]


def test_a_copy_is_not_what_the_loop_fills_again() -> None:
    batch = (rows(2).requires_grad_(), {"y": ["a", "b"], "z": np.zeros(2)}, unlike(2), rows(2) * 2)
    made: Any = copied((batch[0] * 1, *batch[1:]))
    assert made[0].requires_grad
    assert made[0].is_leaf  # nothing of the graph behind it is kept
    assert not made[3].requires_grad
    expected = (batch[0].detach().clone(), ["a", "b"], [0.0, 0.0], [0.0], (rows(2) * 2).clone())
    with torch.no_grad():
        batch[0].zero_()
        batch[2][0].fill_(7)
        batch[3].zero_()
    batch[1]["y"][0], batch[1]["z"][0] = "q", 7
    assert torch.equal(made[0], expected[0])
    assert (made[1]["y"], made[1]["z"].tolist()) == (expected[1], expected[2])
    assert made[2][0].tolist() == expected[3]
    assert torch.equal(made[3], expected[4])


@pytest.mark.parametrize(("given", "half"), [(2, None), (3, None), (4, 2), (5, 2), (6, 3), (7, 3)])
def test_the_first_half_of_a_batch_where_it_has_two_examples(given: int, half: int | None) -> None:
    found: list[Any] = smaller((rows(given), torch.arange(given)))
    assert [x.tolist() for x, _ in found] == ([] if half is None else [rows(given)[:half].tolist()])
    assert [y.tolist() for _, y in found] == ([] if half is None else [list(range(half))])


def test_a_batch_with_more_than_tensors_is_run_one_by_one() -> None:
    batch = (rows(3), ["1", "2", "3"], torch.tensor([10.0, 20.0]))

    def loss(model: nn.Module, one: Any) -> Tensor:
        assert (len(one[0]), len(one[1]), len(one[2])) == (1, 1, 2)
        return one[0].sum() + int(one[1][0]) * one[2].sum()

    losses, why = example_losses(nn.Identity(), loss, batch)
    assert losses.tolist() == [1 + 30, 5 + 60, 9 + 90]
    assert why == "a batch holds more than tensors"


def test_batches_become_one_with_all_their_examples() -> None:
    weight = torch.ones(3)
    parts = [(rows(n), ["a"] * n, np.arange(n), unlike(n) if n > 1 else [], weight, 0.5) for n in (4, 2)]
    ((x, y, array, series, same, number),) = join(parts)  # type: ignore[misc]
    assert torch.equal(x, torch.cat([rows(4), rows(2)]))
    assert y == ["a"] * 6
    assert isinstance(array, np.ndarray)
    assert array.tolist() == [0, 1, 2, 3, 0, 1]
    assert [len(one) for one in series] == [1, 2, 3, 4, 1, 2]
    assert (same is weight, number) == (True, 0.5)
    ((x, y, array, *_),) = join(parts[:1])  # type: ignore[misc]
    assert (x.tolist(), y, array.tolist()) == (rows(4).tolist(), ["a"] * 4, [0, 1, 2, 3])
    assert join([]) == []


SPARSE = torch.eye(2).to_sparse()
BESIDE: list[
    tuple[Any, Any, bool]
] = [  # what lies beside four and three examples, and whether it is the same
    (torch.ones(2, 3), torch.ones(2, 3), True),
    (torch.ones(2, 3), torch.zeros(2, 3), False),
    (torch.ones(2, 3), torch.ones(2, 5), False),
    (torch.ones(2), torch.ones(2).long(), False),
    (torch.tensor(1.0), 1.0, False),
    (SPARSE, SPARSE, True),
    (SPARSE, SPARSE.clone(), False),  # nobody knows
    (SPARSE, torch.eye(2), False),
    (torch.eye(2), SPARSE, False),
    (np.ones(2), np.ones(2), True),
    (np.ones(2), np.zeros(2), False),
    (3, 3, True),
    (3, 4, False),
    ("a", "a", True),
    (None, None, True),
    (range(3), range(9), False),
]


@pytest.mark.parametrize(("one", "other", "same"), BESIDE)
def test_what_lies_beside_the_examples_is_the_same_or_they_stay_apart(
    one: Any, other: Any, same: bool
) -> None:
    parts = [(rows(4), one), (rows(3), other), (rows(4), one)]
    made: list[Any] = join(parts)
    assert [len(x) for x, _ in made] == ([11] if same else [4, 3, 4])
    if not same:
        assert all(torch.equal(a[0], b[0]) and a[1] is b[1] for a, b in zip(made, parts, strict=True))


@pytest.mark.parametrize(
    "parts",
    [
        [(rows(4), rows(4)), (rows(2), rows(2)), [rows(4), rows(4)]],  # a list among tuples
        [(rows(4), torch.ones(3)), (rows(3), torch.ones(3))],  # a leaf that looks like examples in one
        [(rows(4, 5), rows(4)), (rows(4, 6), rows(4))],  # sequences of unlike length
        [(rows(4).reshape(4, 1, 2), 0.5), (rows(4).reshape(4, 2, 1), 0.5)],
    ],
)
def test_batches_that_do_not_fit_stay_as_they_are(parts: list[Any]) -> None:
    made: list[Any] = join(parts)
    assert [type(one) for one in made] == [type(one) for one in parts]
    assert all(a[0] is b[0] and a[1] is b[1] for a, b in zip(made, parts, strict=True))
