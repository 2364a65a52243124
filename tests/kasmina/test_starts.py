"""Directions candidates start from, against the gradients they promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import esper
from esper.kasmina.race.initialisers import STARTS, centre, per_unit, singular_directions, stretch, survey
from esper.kasmina.seeds.layer import Tap
from esper.kasmina.widths.widen import WidenKernel
from esper.tamiyo import selector
from tests.kasmina.hosts import HOSTS, batch, loss_fn


def tapped(kind: str, site: str) -> tuple[esper.MorphableModel, Tap]:
    torch.manual_seed(0)
    given = batch(kind, 48)
    wrapped = esper.wrap(HOSTS[kind](), given[0])
    tap = Tap()
    wrapped.layer(site, print).tap = tap
    loss_fn(wrapped, given).backward()
    assert tap.fresh()
    return wrapped, tap


def test_directions_come_in_both_signs_best_first_and_are_the_singular_vectors() -> None:
    x, gradient = torch.randn(200, 6), torch.randn(200, 4)
    gradient = gradient + 5 * x[:, :1]  # one direction explains most
    found = singular_directions(x, gradient, 12)
    assert found.shape == (12, 6)
    assert torch.equal(found[0], -found[1])
    assert abs(float(found[0, 0])) > 0.95
    _, values, vectors = torch.linalg.svd(gradient.T @ (x - x.mean(0)))
    torch.testing.assert_close(found[::2][:4].abs(), vectors[:4].abs())
    torch.testing.assert_close(found[8:].norm(dim=1) > 0, torch.tensor([True] * 4))
    assert torch.linalg.matrix_rank(found) == 4
    assert values[0] > values[1]


def test_many_dimensions_are_decomposed_at_random_to_the_same_directions() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 300)
    gradient = torch.zeros(400, 300)
    for index in range(3):
        gradient[:, index] = 10.0 ** (2 - index) * x[:, index + 5]
    found = singular_directions(x, gradient, 6)
    _, _, exact = torch.linalg.svd(gradient.T @ (x - x.mean(0)))
    for index in range(3):
        assert abs(float(found[2 * index] @ exact[index])) > 0.999


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("mlp", "fc1>fc2"),
        ("residual", "block.conv1>block.conv2"),
        ("residual", "last>head"),
        ("transformer", "blocks.0.up>blocks.0.down"),
    ],
)
def test_scores_are_the_squared_gradients_of_outgoing_weights_best_first(kind: str, site: str) -> None:
    wrapped, tap = tapped(kind, site)
    assert tap.x is not None
    assert tap.gradient is not None
    found = survey(wrapped.pairs[site], tap.x, tap.gradient, 8)
    assert found.score.tolist() == sorted(found.score.tolist(), reverse=True)
    assert found.improvement == float(found.score[0]) > 0
    assert found.units["producer_weight"].shape[1:] == wrapped.pairs[site].producer.weight.shape[1:]
    kernel = WidenKernel(wrapped.pairs[site], 1)
    with torch.no_grad():
        kernel.producer_weight.copy_(found.units["producer_weight"][:1])
        if kernel.producer_bias is not None:
            kernel.producer_bias.copy_(found.units["producer_bias"][:1])
    layer = wrapped.layers[site.replace(".", "_").replace(">", "__")]
    with layer.showing(kernel):  # the real loss, with the unit there
        torch.manual_seed(0)
        given = batch(kind, 48)
        modes = [m for m in wrapped.host.modules() if isinstance(m, (nn.Dropout, nn.Dropout2d))]
        if not modes:
            (slope,) = torch.autograd.grad(loss_fn(wrapped, given), kernel.consumer_weight)
            torch.testing.assert_close(per_unit(slope, 1, 1)[0], found.score[0], rtol=1e-3, atol=1e-9)


def test_singular_directions_beat_random_ones() -> None:
    wrapped, tap = tapped("mlp", "fc1>fc2")
    assert tap.x is not None
    assert tap.gradient is not None
    pair = wrapped.pairs["fc1>fc2"]
    found = survey(pair, tap.x, tap.gradient, 16)
    kernel = WidenKernel(pair, 64)
    stretch(kernel, torch.randn(64, 10))
    centre(kernel, tap.x)
    (slope,) = torch.autograd.grad((kernel(tap.x) * tap.gradient).sum(), kernel.consumer_weight)
    assert found.improvement > float(per_unit(slope, 1, 64).median())


def test_placed_units_are_as_long_as_the_hosts_rows_and_centred_units_are_half_on() -> None:
    wrapped, tap = tapped("mlp", "fc1>fc2")
    assert tap.x is not None
    pair = wrapped.pairs["fc1>fc2"]
    kernel = WidenKernel(pair, 20)
    stretch(kernel, torch.randn(20, 10) * torch.logspace(-3, 3, 20)[:, None])
    wanted = float(pair.producer.weight.detach().norm(dim=1).mean())
    torch.testing.assert_close(kernel.producer_weight.detach().norm(dim=1), torch.full((20,), wanted))
    centre(kernel, tap.x)
    h = F.linear(tap.x, kernel.producer_weight, kernel.producer_bias).detach()
    torch.testing.assert_close(h.mean(0), torch.zeros(20), atol=1e-5, rtol=0)
    assert float((h > 0).float().mean(0).min()) > 0.1


def test_a_direction_of_zero_length_does_not_become_nan() -> None:
    wrapped, _ = tapped("mlp", "fc1>fc2")
    kernel = WidenKernel(wrapped.pairs["fc1>fc2"], 2)
    stretch(kernel, torch.zeros(2, 10))
    assert bool(kernel.producer_weight.isfinite().all())


def test_the_default_dtype_of_torch_changes_nothing() -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(20, 6), torch.randn(20, 3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert singular_directions(x, gradient, 12).dtype is torch.float32
    finally:
        torch.set_default_dtype(before)


def test_every_way_to_start_that_tamiyo_may_choose_is_one_the_race_knows() -> None:
    assert STARTS.keys() == selector.STARTS.keys()
