"""Blocks with a residual: the width inside is offered, that of the stream not; other layers say why not."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import esper
from esper.kasmina.widths.widen import HostKernel
from esper.surgery.widen_layers import widen
from tests.kasmina.zoo import Net

IMAGE = torch.randn(5, 3, 8, 8)


class Basic(nn.Module):
    """As torchvision writes it."""

    def __init__(self, width: int, wide: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, wide, 3, stride, padding=1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(wide), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.downsample: nn.Module | None = None
        if stride > 1 or width != wide:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, wide, 1, stride, bias=False), nn.BatchNorm2d(wide)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(nn.Module):
    """As torchvision writes it."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += x
        return self.relu(out)


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 5), nn.Linear(5, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


def images(*blocks: nn.Module, width: int) -> nn.Module:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)]
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), *blocks, *pool)


HOSTS = {
    "basic": (
        lambda: images(Basic(6, 6), Basic(6, 8, 2), width=8),
        IMAGE,
        ["3.conv1>3.conv2", "4.conv1>4.conv2"],
        ["0", "3.conv2", "4.conv2", "4.downsample.0", "7"],
    ),
    "bottleneck": (
        lambda: images(Bottleneck(6, 3), Bottleneck(6, 4), width=6),
        IMAGE,
        ["3.conv1>3.conv2", "3.conv2>3.conv3", "4.conv1>4.conv2", "4.conv2>4.conv3"],
        ["0", "3.conv3", "4.conv3", "7"],
    ),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 6), Mlp(6), Mlp(6), nn.Linear(6, 3)),
        torch.randn(5, 4),
        ["1.fc1>1.fc2", "2.fc1>2.fc2"],
        ["0", "1.fc2", "2.fc2", "3"],
    ),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_the_width_inside_residual_blocks_grows_and_that_of_the_stream_does_not(kind: str) -> None:
    build, x, sites, refused = HOSTS[kind]
    torch.manual_seed(0)
    net = build()
    net.train()(x)  # running statistics that are not those of birth
    wrapped = esper.wrap(net.eval(), x, blueprints=["widen"])
    assert list(wrapped.pairs) == sites
    assert sorted(r.place for r in wrapped.refusals) == sorted(refused)
    with torch.no_grad():
        first = net(x)
        for site in sites:
            kernel = wrapped.pairs[site].kernel(3)
            assert isinstance(kernel, HostKernel)
            plan = kernel.plan()
            widen(net, plan, kernel.slices(plan))
            wrapped.refresh(lambda: net(x))
        allowed = 2e-6 * float(first.abs().max()) * math.sqrt(len(sites) + 3)
        assert float((net(x) - first).abs().max()) <= allowed
    optimizer = torch.optim.SGD(net.train().parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    for site in sites:
        weight = net.get_submodule(site.split(">")[0]).weight
        assert isinstance(weight, nn.Parameter)
        assert weight.grad is not None
        assert bool((weight.grad[-3:].flatten(1).abs().amax(1) > 0).all()), "the new units learn"


def indexed(s: Net, x: Tensor) -> Tensor:
    values, where = s.a(x).max(1)
    return s.b(values) + where.sum()


def test_a_call_whose_other_results_are_read_is_refused() -> None:
    net = Net(indexed, a=nn.Linear(4, 3), b=nn.Linear(3, 4), c=nn.Linear(4, 4))
    head = Net(lambda s, x: s.d(s.e(torch.relu(s.net(x)))), net=net, e=nn.Linear(4, 3), d=nn.Linear(3, 2))
    wrapped = esper.wrap(head, torch.randn(5, 3, 4), blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    assert "max over the output of net.a has several results that are read" in told["net.a"]


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def pair() -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 3), "b": nn.Linear(3, 4)}


FLAT, IDS = torch.randn(5, 4), torch.randint(3, (5, 2))
REASONS: dict[str, tuple[nn.Module, Tensor, str, str]] = {
    "embedding": (
        Net(lambda s, x: s.b(torch.relu(s.a(s.e(x)))), e=nn.Embedding(3, 4), **pair()),
        IDS,
        "e",
        "width of an Embedding .*a Linear behind it",
    ),
    "bag": (
        Net(lambda s, x: s.b(torch.relu(s.a(s.e(x)))), e=nn.EmbeddingBag(3, 4), **pair()),
        IDS,
        "e",
        "width of an EmbeddingBag",
    ),
    "bilinear": (
        Net(lambda s, x: s.b(torch.relu(s.a(s.e(x, x)))), e=nn.Bilinear(4, 4, 4), **pair()),
        FLAT,
        "e",
        "two inputs .*two Linear layers",
    ),
    "attention": (
        Net(
            lambda s, x: s.b(torch.relu(s.a(s.e(x[:, None], x[:, None], x[:, None])[0][:, 0]))),
            e=nn.MultiheadAttention(4, 2, batch_first=True), **pair(),
        ),
        FLAT,
        "e",
        "embed_dim; q, k and v as Linear layers",
    ),
    "matrix of one's own": (
        Net(lambda s, x: s.b(torch.relu(s.a(s.e(x)))), e=Own(), **pair()),
        FLAT,
        "e",
        "an? Own is no Linear.*its matrix does",
    ),
    "grouped transposed convolution": (
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 1)),
        torch.randn(5, 4, 3, 3),
        "0",
        "0 is a grouped convolution",
    ),
    "into a grouped transposed convolution": (
        nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 3, 1), nn.Conv2d(3, 2, 1)
        ),
        torch.randn(5, 4, 3, 3),
        "0",
        "1 is grouped",
    ),
    "output_size": (
        Net(
            lambda s, x: s.b(torch.relu(s.c(s.t(x, output_size=(6, 6))))),
            t=nn.ConvTranspose2d(4, 3, 3, 2, 1), c=nn.Conv2d(3, 3, 1), b=nn.Conv2d(3, 2, 1),
        ),
        torch.randn(5, 4, 3, 3),
        "t",
        "called with output_size; give it output_padding",
    ),
    "into a recurrent layer": (
        Net(lambda s, x: s.b(torch.relu(s.a(s.r(s.c(x))[0]))), c=nn.Linear(4, 4), r=nn.GRU(4, 4), **pair()),
        torch.randn(5, 2, 4),
        "c",
        r"a recurrent layer \(gru\) reads the output of c",
    ),
    "from one recurrent layer into another": (
        Net(lambda s, x: s.a(s.r(s.q(x)[0])[0]), q=nn.LSTM(4, 4), r=nn.GRU(4, 4), **pair()),
        torch.randn(5, 2, 4),
        "q",
        r"a recurrent layer \(gru\) reads the output of q",
    ),
    "into a weight-normed layer": (
        nn.Sequential(nn.Linear(4, 3), weight_norm(nn.Linear(3, 4)), nn.Linear(4, 3), nn.Linear(3, 2)),
        FLAT,
        "0",
        "weight is made in the pass .*remove its parametrisation",
    ),
    "recurrent layer on one example": (
        nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4), nn.LSTM(4, 2)),
        torch.randn(2, 4),
        "3",
        "3 runs on input without a batch axis",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REASONS)
def test_every_module_with_weights_says_why_it_cannot_grow(case: str) -> None:
    net, x, place, reason = REASONS[case]
    wrapped = esper.wrap(net, x, blueprints=["widen"])
    told = {refusal.place: refusal.reason for refusal in wrapped.refusals}
    assert re.search(reason, told[place]), told[place]
    matrices = {
        n for n, m in net.named_modules() if any(p.dim() > 1 for p in m._parameters.values() if p is not None)
    }
    places = {pair.site.entry for pair in wrapped.pairs.values()} | set(told)
    assert matrices <= places | {n for n in matrices if "parametrizations" in n}
