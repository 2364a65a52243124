"""A norm without weights between two layers knows its width by a number: it grows with the layers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import esper
from esper.errors import SiteError
from esper.surgery.widen_layers import widen

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NORMS: dict[str, tuple[nn.Module, str]] = {
    "instance norm": (nn.InstanceNorm2d(8), "num_features"),
    "batch norm without weights": (nn.BatchNorm2d(8, affine=False), "num_features"),
    "batch norm without anything": (
        nn.BatchNorm2d(8, affine=False, track_running_stats=False),
        "num_features",
    ),
    "group norm without weights": (nn.GroupNorm(2, 8, affine=False), "num_channels"),
}


def host(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))


@pytest.mark.parametrize("kind", NORMS)
def test_the_number_of_a_norm_grows_with_the_layers(kind: str) -> None:
    norm, number = NORMS[kind]
    net = host(norm)
    place = esper.wrap(net, X, blueprints=["widen"]).pairs["0>4"]
    kernel = place.kernel(place.site.granularity)
    before = net.train()(X)
    widen(net, place.plan(kernel.units), kernel.slices(kernel.plan()))
    assert getattr(norm, number) == net[0].out_channels == 8 + kernel.units
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(net(X), before, atol=1e-5)
        net.eval()(X)
    assert not norm._forward_hooks
    assert not norm._forward_pre_hooks


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm([8, 6, 6], elementwise_affine=False), nn.ChannelShuffle(2), nn.PReLU(8)]
)
def test_what_mixes_or_owns_channels_is_refused_by_name(norm: nn.Module) -> None:
    with pytest.raises(SiteError, match=r"layer_norm|channel_shuffle|PReLU 1"):
        esper.wrap(host(norm), X, blueprints=["widen"])


def test_a_norm_that_serves_two_layers_is_refused() -> None:
    norm = nn.GroupNorm(2, 8, affine=False)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.Conv2d(8, 8, 3), norm, nn.Flatten(), nn.Linear(128, 3))
    with pytest.raises(SiteError, match="1 between 0 and its consumer is called 2 times"):
        esper.wrap(net, X, blueprints=["widen"])


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_a_depthwise_convolution_with_padding_of_its_own_kind_is_passed(mode: str) -> None:
    """What it pads by is a call before its own, and was made twice for new channels."""
    torch.manual_seed(0)
    between = nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode=mode)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), between, nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert "0>3" in esper.wrap(net, torch.randn(4, 1, 8, 8), blueprints=["widen"]).places
