"""Every class of torch.nn with weights, between two Linears: a place, or a refusal with a reason."""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import QuantStub
from torch.nn.utils import parametrizations, prune

import esper

X = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0))
Call = Callable[[Any, Tensor], Tensor]


class Host(nn.Module):
    """A layer between two Linears."""

    def __init__(self, between: nn.Module, call: Call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.m, self.b = nn.Linear(8, 8), between, nn.Linear(8, 4)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        """Return (6, …, 4)."""
        made: Tensor = self.b(self.call(self.m, torch.relu(self.a(x))))
        return made


def plain(m: Any, h: Tensor) -> Tensor:
    made: Tensor = m(h)
    return made


def first(m: Any, h: Tensor) -> Tensor:
    made: Tensor = m(h)[0]
    return made


def image(dims: int) -> Call:
    def call(m: Any, h: Tensor) -> Tensor:
        x = h.transpose(1, 2)
        for _ in range(dims - 1):
            x = x.unsqueeze(-1)
        made: Tensor = m(x)
        for _ in range(dims - 1):
            made = made.squeeze(-1)
        return made.transpose(1, 2)

    return call


GROWS = "grows"  # as a producer: a place begins at it or in it
PASSED = "passed"  # a place leads through it
Row = tuple[Callable[[], nn.Module], Call, str]
TABLE: dict[str, Row] = {
    "Linear": (lambda: nn.Linear(8, 8), plain, GROWS),
    "LazyLinear": (lambda: nn.LazyLinear(8), plain, GROWS),
    "Bilinear": (lambda: nn.Bilinear(8, 8, 8), lambda m, h: m(h, h), "m: a Bilinear reads two inputs"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(8), image(2), r"a: SyncBatchNorm m \(batch_norm\) stands"),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), image(1), PASSED),
    "LayerNorm": (lambda: nn.LayerNorm(8), plain, r"a: LayerNorm m \(layer_norm\) stands between"),
    "RMSNorm": (lambda: nn.RMSNorm(8), plain, r"a: RMSNorm m \(rms_norm\) stands between"),
    "PReLU": (lambda: nn.PReLU(), plain, PASSED),
    "Embedding": (
        lambda: nn.Embedding(9, 8),
        lambda m, h: m(h.argmax(-1)),
        "m: the width of an Embedding",
    ),
    "EmbeddingBag": (
        lambda: nn.EmbeddingBag(9, 8),
        lambda m, h: m(h.argmax(-1)),
        "m: the width of an EmbeddingBag",
    ),
    "RNN": (lambda: nn.RNN(8, 8, batch_first=True), first, GROWS),
    "LSTM": (lambda: nn.LSTM(8, 8, batch_first=True), first, GROWS),
    "GRU": (lambda: nn.GRU(8, 8, batch_first=True), first, GROWS),
    "RNNCell": (lambda: nn.RNNCell(8, 8), lambda m, h: m(h[:, 0]), "m: a RNNCell is called once per"),
    "LSTMCell": (lambda: nn.LSTMCell(8, 8), lambda m, h: m(h[:, 0])[0], "m: a LSTMCell is called once per"),
    "GRUCell": (lambda: nn.GRUCell(8, 8), lambda m, h: m(h[:, 0]), "m: a GRUCell is called once per"),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda m, h: m(h, h, h)[0],
        "m: nn.MultiheadAttention fixes its width",
    ),
    "TransformerEncoderLayer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        plain,
        GROWS,
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        lambda m, h: m(h, h),
        GROWS,
    ),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
        plain,
        GROWS,
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1),
        lambda m, h: m(h, h),
        GROWS,
    ),
    "Transformer": (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), lambda m, h: m(h, h), GROWS),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(8, 9, [3, 6]),
        lambda m, h: m.log_prob(h.flatten(0, 1))[:, :8],
        "m.tail.1.0: m.tail.1.0 makes nothing: it has a width of 0",
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 8)),
        plain,
        r"m: the weight of m is parametrised",
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Linear(8, 8)),
        plain,
        r"m: the weight of m is parametrised",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 2),
        plain,
        r"m: the weight of m is parametrised \(or pruned\)",
    ),
    "QuantStub": (QuantStub, plain, PASSED),
}
SIZED = {
    "Conv": (lambda layer: layer(8, 8, 1), GROWS),
    "ConvTranspose": (lambda layer: layer(8, 8, 1), GROWS),
    "LazyConv": (lambda layer: layer(8, 1), GROWS),
    "LazyConvTranspose": (lambda layer: layer(8, 1), GROWS),
    "BatchNorm": (lambda layer: layer(8), PASSED),
    "LazyBatchNorm": (lambda layer: layer(), PASSED),
    "InstanceNorm": (lambda layer: layer(8, affine=True), r"a: InstanceNorm.d m \(instance_norm\) stands"),
    "LazyInstanceNorm": (lambda layer: layer(affine=True), r"a: InstanceNorm.d m \(instance_norm\) stands"),
}
for dims in (1, 2, 3):
    for kind, (build, expected) in SIZED.items():
        layer = getattr(nn, f"{kind}{dims}d")
        TABLE[f"{kind}{dims}d"] = partial(build, layer), image(dims), expected

WIDTHS = frozenset(
    "in_features in_channels num_features embedding_dim input_size d_model num_parameters affine embed_dim "
    "in1_features normalized_shape num_channels".split()
)
NONE = {"RNNBase", "RNNCellBase", "LinearCrossEntropyLoss"}  # bases, and a loss


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_is_a_place_or_is_refused_with_a_reason(name: str) -> None:
    build, call, expected = TABLE[name]
    torch.manual_seed(0)
    net = Host(build(), call)
    net(X)  # lazy ones get their sizes
    beside = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    wrapped = esper.wrap(nn.Sequential(OrderedDict(net=net, beside=beside)), X, blueprints=["widen"])
    told = {one.place.removeprefix("net."): one.reason.replace("net.", "") for one in wrapped.refusals}
    places = list(wrapped.pairs.values())
    entries = {place.site.entry.removeprefix("net.") for place in places}
    if expected == GROWS:
        assert any(entry.partition(".")[0] == "m" for entry in entries)
    elif expected == PASSED:
        assert any(place.site.name == "net.a>net.b" for place in places)
    else:
        assert re.search(expected, "; ".join(f"{place}: {reason}" for place, reason in told.items()))
    for path, module in net.named_modules():
        if any(one is not None and one.dim() > 1 for one in module._parameters.values()):
            assert path in entries | set(told), f"{path} is passed over in silence"


def test_the_table_has_every_class_with_a_width() -> None:
    classes = {
        name: one for name, one in vars(nn).items() if isinstance(one, type) and issubclass(one, nn.Module)
    }
    sized = {name for name, one in classes.items() if WIDTHS & set(inspect.signature(one).parameters)}
    assert sized - TABLE.keys() - NONE == set()
