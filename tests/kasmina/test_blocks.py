"""Places beside and behind layers: found by running, priced, and refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.blueprints import CATALOGUE
from esper.contracts import Signature
from esper.errors import BlueprintError, RegistryError, SiteError
from esper.kasmina.branches.blocks import Block

GRAPHS = ("residual_mlp", "conv3x3", "conv1x1", "low_rank", "bottleneck_adapter", "self_attention")


class Unusual(nn.Module):
    """One layer for every way a place can be impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.twice, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.train_only, self.folded = nn.Linear(6, 6), nn.Linear(6, 6)
        self.fused = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.fine(x)))
        if self.training:
            x = x + self.train_only(x)
        x = self.fused(x + 0)
        return self.folded(x.reshape(2, -1, 6)).reshape(-1, 6)


def found(net: nn.Module, x: Any, *names: str) -> esper.MorphableModel:
    return esper.wrap(net, x, blueprints=names or GRAPHS)


def reasons(wrapped: esper.MorphableModel) -> dict[str, str]:
    return {refusal.place: refusal.reason for refusal in wrapped.refusals}


def test_layers_blocks_containers_and_spans_are_places() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), inner, nn.Linear(8, 3))
    wrapped = found(net, torch.randn(4, 6), "residual_mlp")
    names = {name.partition("+")[0]: place for name, place in wrapped.places.items()}
    assert sorted(names) == ["0", "0:1", "2", "2.0", "3"]
    assert names["0:1"].ends() == (net[0], net[1])
    assert names["0:1"].site.kind == "span"
    assert {place.site.kind for name, place in names.items() if ":" not in name} == {"module"}
    assert "residual_mlp" in str(esper.summary(wrapped))


def test_what_a_pre_hook_changes_is_read_by_no_kernel() -> None:
    """A seam stands before the hook, a kept branch behind it: another function was kept than was judged."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    net[2].register_forward_pre_hook(lambda module, args: None)
    wrapped = found(net, torch.randn(4, 6), "residual_mlp", "bottleneck_adapter", "gated")
    read = {name: getattr(place, "port", "") for name, place in wrapped.places.items()}
    assert {port for name, port in read.items() if name.startswith("0")} == {"serial"}
    assert "parallel" in {port for name, port in read.items() if name.startswith("2")}


def test_impossible_places_say_why() -> None:
    told = reasons(found(Unusual(), torch.randn(8, 6), "residual_mlp"))
    assert told["twice"] == "called 2 times in one pass in training"
    assert told["unused"] == "not called as a module in training"
    assert told["train_only"] == "not called as a module in evaluation"
    assert "has 2 entries for 8 examples" in told["folded"]
    assert "fine" not in told


def test_an_input_that_is_overwritten_leaves_the_serial_port() -> None:
    wrapped = found(Unusual(), torch.randn(8, 6), "residual_mlp")
    place = wrapped.places["fused+residual_mlp"]
    assert place.port == "serial"


def test_a_fast_path_that_skips_its_children_is_not_a_place() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    net = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 2))
    wrapped = found(net, torch.randn(4, 5, 8), "residual_mlp")
    assert "1+residual_mlp" in wrapped.places
    assert reasons(wrapped)["1.linear1"] == "not called as a module in evaluation"
    assert reasons(wrapped)["1.self_attn.out_proj"] == "not called as a module in training"


@pytest.mark.parametrize(
    ("conv", "kept"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), {"stride": (2, 2), "padding": (1, 1)}),
        (nn.Conv2d(4, 4, 3, padding="same", dilation=2), {"padding": (2, 2), "dilation": (2, 2)}),
        (nn.Conv2d(4, 8, 3, groups=2, padding_mode="reflect", padding=1), {"padding_mode": "reflect"}),
        (nn.Conv2d(4, 8, 3, groups=2), {"groups": 2, "padding": (0, 0)}),
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), {"kernel_size": (1, 3)}),
    ],
)
def test_a_convolution_keeps_its_geometry_in_the_signature(conv: nn.Conv2d, kept: dict[str, object]) -> None:
    net = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(conv.out_channels, 2, 1))
    wrapped = found(net, torch.randn(3, 4, 9, 9))
    blocks = [p for p in wrapped.places.values() if isinstance(p, Block) and p.entry is conv is p.exit]
    beside = [block for block in blocks if block.port == "parallel"]
    for block in beside:
        assert {name: getattr(block.signature, name) for name in kept} == kept
        x = torch.randn(2, 4, 9, 9)
        assert block.kernel(block.site.granularity)(x).shape == conv(x).shape
    assert blocks


def test_prices_are_those_of_real_kernels() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    for place in found(net, torch.randn(3, 2, 6, 6), "residual_mlp", "conv3x3", "conv1x1").places.values():
        site = place.site
        for units in (site.granularity, 3 * site.granularity) if site.most is None else (1,):
            counted = sum(p.numel() for p in place.kernel(units).parameters())
            assert counted == site.base_parameters + units * site.unit_parameters, site.name


def test_embeddings_recurrent_layers_and_dictionaries_of_outputs() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner = nn.Embedding(9, 6), nn.Linear(6, 6)
            self.lstm = nn.LSTM(6, 7, batch_first=True)

        def forward(self, *, tokens: Tensor) -> dict[str, Tensor]:
            y, _ = self.lstm(self.inner(self.embed(tokens)))
            return {"out": y.mean(1)}

    wrapped = found(Host(), {"tokens": torch.randint(0, 9, (4, 5))}, "residual_mlp")
    signature = Signature("sequence", "parallel", 6, 7)
    place = wrapped.places["lstm+residual_mlp"]
    assert isinstance(place, Block)
    assert place.signature == signature
    assert "embed" not in {name.partition("+")[0] for name in wrapped.places}


def test_auto_offers_the_catalogue_only_where_nothing_can_be_widened() -> None:
    pair = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    assert {p.site.kind for p in esper.wrap(pair, torch.randn(4, 6)).places.values()} == {"pair"}
    lone = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    kinds = {place.site.kind for place in esper.wrap(lone, torch.randn(4, 6)).places.values()}
    assert kinds
    assert "pair" not in kinds
    with pytest.raises(SiteError, match="no place to grow"):
        esper.wrap(lone, torch.randn(4, 6), blueprints=("widen",))


def test_unknown_blueprints_and_broken_files_are_refused(tmp_path: Any) -> None:
    net = nn.Linear(6, 6)
    with pytest.raises(RegistryError, match="did you mean 'residual_mlp'"):
        found(net, torch.randn(4, 6), "residual_mpl")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(BlueprintError):
        found(net, torch.randn(4, 6), str(tmp_path / "mine.json"))
    with pytest.raises(BlueprintError, match="cannot read the blueprint"):
        found(net, torch.randn(4, 6), str(tmp_path / "none.json"))


def test_a_causal_model_is_offered_nothing_that_looks_ahead() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(torch.tril(torch.ones(5, 5)) @ self.mix(x))

    tokens = torch.randint(0, 9, (4, 5))
    offered = {
        name.partition("+")[2] for name in found(Past(), tokens, "causal_attention", "low_rank").places
    }
    assert offered == {"causal_attention", "low_rank"}
    with pytest.raises(SiteError, match="mixes all positions"):
        found(Past(), tokens, "self_attention")
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0)
    both = nn.Sequential(nn.Embedding(9, 6), layer, nn.Linear(6, 9))
    assert "1+self_attention" in found(both, tokens, "self_attention").places


@pytest.mark.parametrize("name", CATALOGUE.names())
def test_no_kernel_costs_more_than_its_price(name: str) -> None:
    encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
    hosts = [
        (nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)), torch.randn(4, 6)),
        (
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 3)),
            torch.randn(4, 2, 6, 6),
        ),
        (nn.Sequential(nn.Linear(6, 6), encoder), torch.randn(4, 5, 6)),
    ]
    priced = 0
    for net, x in hosts:
        inner = nn.Sequential(net, nn.Identity())
        try:
            places = found(inner, x, name).places.values()
        except SiteError:
            continue
        for place in places:
            site, step = place.site, place.site.granularity
            assert isinstance(place, Block)
            for units in range(step, min(site.most or 40 * step, 40 * step) + 1, step):
                real = place.graph.lower(place.signature, units).parameter_count()
                assert real <= site.base_parameters + units * site.unit_parameters, (site, units)
                priced += 1
    assert priced
