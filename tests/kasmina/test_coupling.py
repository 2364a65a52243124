"""What a loss says of an example must not depend on the others, but for one common factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.errors import ProbeError
from esper.kasmina.evidence.coupling import independent
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.widths.places import Place


class Host(nn.Module):
    """Two layers around whatever stands between; (batch, 4) or (batch, time, 4) to three logits."""

    def __init__(self, *between: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), *between, nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def places(model: nn.Module, loss_fn: Any, batch: Any) -> dict[str, Place]:
    x = batch["x"] if isinstance(batch, dict) else batch[0]
    return MorphableModel(model, lambda m: loss_fn(m, batch), len(x)).places


def asked(model: nn.Module, loss_fn: Any, batch: Any) -> bool | None:
    return independent(model, lambda b: loss_fn(model, b), places(model, loss_fn, batch), batch)


def cross_entropy(**how: Any) -> Any:
    return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], **how)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    own, other = F.normalize(model(batch[0])), F.normalize(batch[0][:, :3])
    return F.cross_entropy(own @ other.T * 5, torch.arange(len(own)))


def spread(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    return F.cross_entropy(logits, batch[1]) + 0.01 * logits.std(0).mean()


def mixed(model: nn.Module, batch: Any) -> Tensor:
    other = torch.randperm(len(batch[0]))
    return F.cross_entropy(model(0.7 * batch[0] + 0.3 * batch[0][other]), batch[1])


def consistent(model: nn.Module, batch: Any) -> Tensor:
    one, other = model(batch[0]), model(batch[0] + 0.1)
    apart = F.kl_div(one.log_softmax(-1), other.softmax(-1), reduction="batchmean")
    return F.cross_entropy(one, batch[1]) + F.cross_entropy(other, batch[1]) + apart


def siamese(model: nn.Module, batch: Any) -> Tensor:
    own, other = F.normalize(model(batch[0])), F.normalize(model(batch[0] + 0.1))
    return F.cross_entropy(own @ other.T * 5, torch.arange(len(own)))


def halves(model: nn.Module, batch: Any) -> Tensor:
    half = len(batch[0]) // 2
    parts = slice(None, half), slice(half, None)
    return sum((F.cross_entropy(model(batch[0][part]), batch[1][part]) for part in parts), torch.zeros(()))


def beside(model: nn.Module, batch: Any) -> Tensor:
    return (
        F.cross_entropy(model(batch[0]), batch[1])
        + model(torch.linspace(-1, 1, 28).view(7, 4)).square().mean()
    )


def beside_many(model: nn.Module, batch: Any) -> Tensor:
    """26 examples are asked at once, here beside as many rows that are none of theirs."""
    return (
        F.cross_entropy(model(batch[0]), batch[1])
        + model(torch.linspace(-1, 1, 104).view(26, 4)).exp().mean()
    )


def temporal(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        wanted = model(batch[0].tanh())
    return F.mse_loss(model(batch[0]), wanted)


def classes(n: int = 40, ignored: int = 0) -> tuple[Tensor, Tensor]:
    y = torch.randint(3, (n,))
    y[torch.randperm(n)[:ignored]] = -100
    return torch.randn(n, 4), y


LOSSES: dict[str, tuple[Any, bool | None]] = {
    "mean": (cross_entropy(), True),
    "sum": (cross_entropy(reduction="sum"), True),
    "smoothed": (cross_entropy(label_smoothing=0.1), True),
    "regression": (lambda m, b: F.mse_loss(m(b[0]), b[0][:, :3]), True),
    "penalty": (
        lambda m, b: F.cross_entropy(m(b[0]), b[1]) + 0.1 * m.net[0].weight.square().sum(),
        True,
    ),
    "class weights": (cross_entropy(weight=torch.tensor([1.0, 2.0, 40.0])), True),
    "root": (lambda m, b: m(b[0]).square().mean().sqrt(), True),
    "noise": (lambda m, b: (m(b[0]) + torch.randn(len(b[0]), 1)).square().mean(), True),
    "noisy inputs": (lambda m, b: F.cross_entropy(m(b[0] + torch.randn_like(b[0])), b[1]), True),
    "contrastive": (contrastive, False),
    "spread": (spread, False),
    "mixed": (mixed, False),
    "neighbours": (lambda m, b: m(b[0]).diff(dim=0).square().mean(), False),
    "two views": (lambda m, b: F.mse_loss(m(b[0]), m(-b[0])), True),
    "two views and classes": (consistent, True),
    "contrastive over two calls": (siamese, False),
    "halves": (halves, False),
    "a view of something else": (beside, False),
    "as many rows of something else": (beside_many, False),
    "a target without gradients": (temporal, True),
    "views in another order": (lambda m, b: F.mse_loss(m(b[0]), m(b[0].flip(0))), False),
    "nothing": (lambda m, b: 0.0 * m(b[0]).sum(), None),
    "infinite": (lambda m, b: m(b[0]).square().mean() / 0.0, None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_common_factor_couples_nothing_and_everything_else_does(name: str) -> None:
    loss_fn, expected = LOSSES[name]
    torch.manual_seed(0)
    model = Host(nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Tanh())
    batch = classes()
    found, random = places(model, loss_fn, batch), torch.get_rng_state()
    assert independent(model.train(), lambda b: loss_fn(model, b), found, batch) is expected
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert model.net[2].num_batches_tracked == 0
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("ignored", [1, 10, 37])
def test_rows_that_the_loss_does_not_count_are_left_out(ignored: int) -> None:
    torch.manual_seed(0)
    model = Host(nn.Tanh())
    assert asked(model, cross_entropy(), classes(40, ignored)) is True
    assert asked(model, contrastive, classes(40, min(ignored, 10))) is False
    assert asked(model, cross_entropy(), classes(40, 38)) is None


def test_a_mean_over_the_tokens_of_texts_of_unlike_length_couples_nothing() -> None:
    torch.manual_seed(0)
    y = torch.randint(3, (12, 5))
    y[::2, 3:] = -100
    y[5] = -100

    def tokens(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())

    assert asked(Host(nn.Tanh()), tokens, {"x": torch.randn(12, 5, 4), "y": y, "scale": 1.0}) is True


def test_statistics_of_the_batch_couple_examples() -> None:
    torch.manual_seed(0)
    for tracked in (True, False):
        model = Host(nn.BatchNorm1d(8, track_running_stats=tracked), nn.Tanh())
        assert asked(model, cross_entropy(), classes()) is tracked


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rounding_is_no_coupling(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, y = classes(200)
    model = Host(nn.Tanh()).to(dtype)
    assert asked(model, cross_entropy(), (x.to(dtype), y)) is True
    assert asked(model, contrastive, (x.to(dtype), y)) is False


def test_time_may_be_the_first_axis() -> None:
    torch.manual_seed(0)

    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.one, self.two = nn.GRU(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:  # (batch, time, 4)
            y: Tensor = self.two(self.one(self.read(x.transpose(0, 1))[0]).tanh())  # (time, batch, 3)
            return y[-1]

    assert asked(Sequences(), cross_entropy(), (torch.randn(30, 7, 4), torch.randint(3, (30,)))) is True


def test_a_batch_that_cannot_be_cut_is_refused_and_one_too_small_is_unknown() -> None:
    torch.manual_seed(0)
    model = Host(nn.Tanh())
    with pytest.raises(ProbeError, match="that of 26 of them cannot"):
        asked(model, lambda m, b: m(b[0].view(40, 4)).mean(), classes())
    assert asked(model, cross_entropy(), classes(2)) is None
