"""Beside a convolution a kernel has exactly its output size, on every size, or is refused."""

import pytest
import torch
from torch import nn

from esper.blueprints.graph import Graph, node
from esper.blueprints.kernel import GraphKernel
from esper.blueprints.sizes import example_shapes
from esper.contracts import Signature
from esper.errors import BlueprintError
from tests.blueprints.graphs import STRIDED, graph

SIZES = [(13, 17), (14, 16), (15, 15), (16, 14), (17, 13)]


def alone(**attributes: object) -> Graph:
    return graph(node("out", "conv", "x", channels="outputs", **attributes))  # type: ignore[arg-type]


def beside(host: nn.Conv2d) -> Signature:
    return Signature(
        "image",
        "parallel",
        host.in_channels,
        host.out_channels,
        host.kernel_size,
        host.stride,
        tuple(int(size) for size in host.padding),
        host.dilation,
        host.groups,
        host.padding_mode,
    )


HOSTS = [
    nn.Conv2d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, 3, stride=2, padding=1),
    nn.Conv2d(4, 6, (5, 3), stride=(2, 1), padding=(0, 2)),
    nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
    nn.Conv2d(4, 6, 3, stride=3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 2, stride=2, padding=(1, 0), padding_mode="replicate", groups=2),
    nn.Conv2d(4, 4, 3, padding=1, groups=4),
    nn.Conv2d(4, 6, 7, stride=4),
]


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_the_sites_geometry_is_the_sites_convolution(host: nn.Conv2d) -> None:
    """With the host's weights the kernel gives the host's output, bit for bit."""
    program = alone(geometry="site", groups="groups").lower(beside(host), 1)
    kernel = GraphKernel(program)
    assert host.bias is not None
    with torch.no_grad():
        kernel.get_parameter("out_weight").copy_(host.weight)
        kernel.get_parameter("out_bias").copy_(host.bias)
        for h, w in SIZES:
            x = torch.randn(2, 4, h, w)
            torch.testing.assert_close(kernel(x), host(x))


@pytest.mark.parametrize("host", HOSTS, ids=str)
@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (3, 2), (2, 1), (5, 3)])
def test_a_window_of_its_own_has_the_sites_size_or_is_refused(
    host: nn.Conv2d, kernel: int, dilation: int
) -> None:
    one = alone(geometry="window", kernel=kernel, dilation=dilation)
    try:
        program = one.lower(beside(host), 1)
    except BlueprintError as refusal:
        assert "no padding gives" in str(refusal)  # noqa: PT017 - either outcome is right, by geometry
        slack = [
            2 * int(p) - d * (k - 1) + dilation * (kernel - 1)
            for p, d, k in zip(host.padding, host.dilation, host.kernel_size, strict=True)
        ]
        assert any(twice < 0 or twice % 2 for twice in slack)
        return
    for h, w in SIZES:
        x = torch.randn(2, 4, h, w)
        assert GraphKernel(program)(x).shape == host(x).shape


def test_one_pixel_off_at_odd_sizes_only_is_off() -> None:
    """4×4 /2 pad 1 halves even sizes, as 3×3 /2 pad 1 does; at odd ones they part."""
    host = nn.Conv2d(4, 6, 4, stride=2, padding=1)
    assert host(torch.randn(1, 4, 12, 12)).shape == nn.Conv2d(4, 6, 3, 2, 1)(torch.randn(1, 4, 12, 12)).shape
    with pytest.raises(BlueprintError, match="no padding gives"):
        alone(geometry="window", kernel=3).lower(beside(host), 1)


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
def test_example_sizes_meet_every_remainder_and_the_sites_own_formula(stride: int) -> None:
    host = nn.Conv2d(4, 6, 3, stride=stride, padding=1)
    shapes = example_shapes(beside(host))
    assert {given[2] % stride for given, _ in shapes} == set(range(stride))
    for given, expected in shapes:
        assert tuple(host(torch.zeros(given)).shape) == expected
        assert given[2] != given[3]


def test_without_a_convolution_at_the_site_the_size_is_kept() -> None:
    site = Signature("image", "serial", 4, 4)
    for geometry in ("site", "window", "same"):
        program = alone(geometry=geometry, kernel=5).lower(site, 1)
        assert GraphKernel(program)(torch.randn(2, 4, 9, 7)).shape == (2, 4, 9, 7)


def test_a_geometry_is_never_adapted() -> None:
    for attributes in ({"geometry": "same"}, {"geometry": "window", "kernel": 2}):
        with pytest.raises(BlueprintError):
            alone(**attributes).lower(STRIDED, 1)
    twice = graph(
        node("a", "conv", "x", channels=4, geometry="site"),
        node("out", "conv", "a", channels="outputs", geometry="site"),
    )
    with pytest.raises(BlueprintError, match="where the site has"):
        twice.lower(STRIDED, 1)
