"""How much of the evidence goes through the model at once, and what is kept of the loop's batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.batches.examples import count_examples
from esper.batches.portions import LEAST, cut, largest, portions
from tests.cases.loops import Task, narrow, run
from tests.unseen import noting


def images(n: int = 8) -> tuple[Tensor, Tensor]:
    """Draw images whose brightness is their class."""
    y = torch.randint(2, (n,))
    return torch.randn(n, 3, 32, 32) + y.view(-1, 1, 1, 1), y


NOTE, SEEN = noting()  # in no plain sight: that is put back after Esper's passes


class Heavy(nn.Sequential):
    """Convolutions that keep much of each example; notes how many came at once."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1), nn.ReLU()
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        NOTE(len(x))
        y: Tensor = super().forward(x)
        return y


def test_an_event_passes_a_small_multiple_of_the_loop_s_batch_at_once() -> None:
    net = Heavy()
    probe = [images(200), images(40)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def each(i: int, growth: Any) -> None:
        if i == 0:
            SEEN.clear()

    ran = run(net, loss=loss, draw=images, probe=probe, steps=20, each=each)
    assert ran.growth.loop.early is not None
    assert next(r.examples for r in ran.growth.loop.early.records) == 240
    events = [size for size in SEEN if size > 8]
    assert events
    # checks of an insertion repeat the probe's first batch, which the user evaluates at once, too
    assert max(size for size in events if size != 200) <= LEAST


def test_portions_keep_order_and_leave_no_small_rest() -> None:
    draw = Task()
    for sizes in ([8] * 16, [8] * 8 + [1], [300], [64, 64, 1], [200, 3, 3], [70], [5]):
        batches = [(*draw(size), "label") for size in sizes]
        parts = list(portions(batches, 64))
        counts = [count_examples(part) for part in parts]
        assert torch.equal(torch.cat([p[0] for p in parts]), torch.cat([b[0] for b in batches]))
        assert max(counts) <= 80
        assert min(counts) >= min(16, sum(sizes))
        assert {part[2] for part in parts} == {"label"}
    assert list(portions([], 64)) == []


def test_batches_that_cannot_be_joined_stay_apart() -> None:
    batches = [{"x": torch.randn(4, length)} for length in (3, 3, 5)]
    assert [part["x"].shape for part in portions(batches, 64)] == [(4, 3), (4, 3), (4, 5)]
    (whole,) = cut(batches[0], 64)
    assert whole is batches[0]


@pytest.mark.parametrize(("loop", "flops", "most"), [(8, 10**9, 64), (100, 10**9, 400), (8, 2**14, 1024)])
def test_cheap_examples_go_together(loop: int, flops: int, most: int) -> None:
    assert largest(loop, flops) == most


def test_what_is_found_does_not_depend_on_how_it_is_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    apart, together = narrow(), narrow()
    run(together)
    monkeypatch.setattr("esper.tolaria.growth.evidence.evidence.largest", lambda loop, flops: 50)
    run(apart)
    assert apart[0].out_features == together[0].out_features > 1
    assert torch.allclose(apart[0].weight, together[0].weight, atol=1e-3)
