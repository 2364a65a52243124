"""The fastest right form is kept, by a margin; what cannot be measured is None."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esper.tezzeret.characterise import LEAST, MOST, Figures, characterise, fastest, lower_end

X, W = torch.ones(2, 3), [torch.ones(3, 3)]


def quick(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    return x @ weights[0]


def slow(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    end = time.thread_time() + 0.003
    while time.thread_time() < end:
        pass
    return x @ weights[0]


def figures(**speedups: float) -> dict[str, Figures]:
    return {name: Figures(1 / value, value, value, None, 5) for name, value in speedups.items()}


@pytest.mark.parametrize(
    ("speedups", "kept"),
    [
        ({"eager": 1.0, "export": 1.04, "torchscript": 0.9}, "eager"),
        ({"eager": 1.0, "export": 1.05, "torchscript": 1.2}, "torchscript"),
        ({"eager": 1.0}, "eager"),
        ({"eager": 1.0, "export": 0.5}, "eager"),
    ],
)
def test_a_form_is_kept_by_the_margin_only(speedups: dict[str, float], kept: str) -> None:
    assert fastest(figures(**speedups)) == kept


def test_a_median_alone_is_not_enough() -> None:
    """As fast as luck: 20 % faster in the middle, but not surely."""
    found = figures(eager=1.0, export=1.2)
    found["export"] = replace(found["export"], surely=1.04)
    assert fastest(found) == "eager"


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (5, 0), (6, 0), (25, 7), (100, 40), (200, 86)])
def test_the_lower_end_is_the_binomial_one(count: int, rank: int) -> None:
    """The chance that so few of ``count`` values lie below the median is about 2.5 %."""
    assert lower_end(count) == rank
    if count >= 25:
        below = sum(math.comb(count, k) for k in range(rank + 1)) / 2**count
        assert 0.01 < below < 0.04


def test_the_faster_of_two_real_forms_is_found() -> None:
    found = characterise({"eager": slow, "quick": quick}, W, X, budget_seconds=0)
    assert fastest(found) == "quick"
    assert found["quick"].tags == ("fast",)
    assert found["eager"].tags == ()
    assert found["eager"].speedup == 1
    assert found["eager"].rounds == LEAST  # the budget was gone at once
    assert found["eager"].memory is None  # not counted on CPU
    assert json.loads(json.dumps(found["quick"].to_dict())) == found["quick"].to_dict()


def test_rounds_end_even_if_the_budget_does_not() -> None:
    assert characterise({"eager": quick}, W, X, budget_seconds=3600)["eager"].rounds == MOST


def test_the_users_tensors_are_left_alone() -> None:
    leaf = X.clone().requires_grad_()
    characterise({"eager": quick}, W, leaf, budget_seconds=0)
    assert leaf.grad is None
    assert not W[0].requires_grad


@pytest.mark.gpu
def test_memory_is_measured_on_a_device() -> None:
    found = characterise({"eager": quick}, [W[0].cuda()], X.cuda(), budget_seconds=0)
    assert found["eager"].memory
