"""The wrapped model as its users see it: attributes, devices and dtypes, seeds, the summary."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import esper
from esper.contracts import Stage
from esper.kasmina.recording.flops import FlopMeter
from esper.kasmina.widths.widen import WidenKernel
from tests.kasmina.hosts import HOSTS, batch


def test_the_hosts_own_attributes_and_methods_show_through() -> None:
    net = HOSTS["mlp"]()
    net.note = "mine"
    wrapped = esper.wrap(net, batch("mlp")[0])
    assert wrapped.note == "mine"
    assert wrapped.fc1 is net.fc1
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapped.nothing
    assert [id(p) for p in wrapped.parameters()] == [id(p) for p in net.parameters()]
    assert not wrapped.eval().host.training


def test_seeds_are_rows_of_one_layout() -> None:
    wrapped = esper.wrap(HOSTS["mlp"](), batch("mlp")[0], seeds_per_site=3)
    assert [list(wrapped.seeds(site)) for site in wrapped.pairs] == [[0, 1, 2], [3, 4, 5]]
    assert [wrapped.site_of(seed) for seed in range(6)] == ["fc1>fc2"] * 3 + ["fc2>fc3"] * 3
    assert len(wrapped.layout.stage) == 6


def test_an_awake_model_follows_a_cast_and_keeps_its_alpha() -> None:
    net, x = HOSTS["mlp"](), batch("mlp")[0]
    wrapped = esper.wrap(net, x)
    layer = wrapped.layer("fc1>fc2", print)
    layer.kernel = WidenKernel(wrapped.pairs["fc1>fc2"], 2)
    with torch.no_grad():
        layer.kernel.consumer_weight.normal_()
    wrapped.layout.move(0, Stage.DORMANT, Stage.GERMINATED, 0)
    wrapped.layout.alpha[0] = 0.3
    layer.alpha, layer.exposed = wrapped.layout.alpha[0], True
    before = wrapped(x)
    wrapped.double()
    assert layer.kernel.consumer_weight.dtype == net.fc1.weight.dtype == torch.float64
    assert layer.alpha.dtype == torch.float32
    torch.testing.assert_close(wrapped(x.double()).float(), before)
    wrapped.layout.alpha[0] = 0.0
    assert float(layer.alpha) == 0.0, "the layer reads the layout's own row"


def test_the_summary_prints_what_there_is_and_why_not_elsewhere() -> None:
    net, x = HOSTS["residual"](), batch("residual")[0]
    wrapped = esper.wrap(net, x)
    made = esper.summary(wrapped)
    printed = str(made)
    rows = made.to_dict()
    assert json.loads(json.dumps(rows)) == rows
    assert [row["name"] for row in rows["sites"]] == list(wrapped.pairs)
    assert {row["place"] for row in rows["refused"]} == {r.place for r in wrapped.refusals}
    for name in wrapped.pairs:
        assert name in printed
    for refusal in wrapped.refusals:
        assert f"not at {refusal.place}:" in printed
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in printed
    assert all(row["seeds"] == "4 dormant" for row in rows["sites"])
    wrapped.layout.move(1, Stage.DORMANT, Stage.GERMINATED, 0)
    assert esper.summary(wrapped).sites[0]["seeds"] == "3 dormant, 1 germinated"


@pytest.mark.parametrize("kind", sorted(HOSTS))
def test_flops_are_those_of_one_example_forward(kind: str) -> None:
    net, (x, _) = HOSTS[kind](), batch(kind)
    with FlopMeter() as meter, torch.no_grad():
        net.eval()(x)
    assert esper.wrap(net, x).flops * len(x) == meter.total > 0


def test_wrapping_keeps_every_modules_own_mode() -> None:
    net = HOSTS["residual"]().train()
    net.block.bn1.eval()  # frozen statistics, as in fine-tuning
    esper.wrap(net, batch("residual")[0])
    assert [n for n, m in net.named_modules() if not m.training] == ["block.bn1"]


def test_a_host_that_fails_in_one_mode_is_put_back() -> None:
    class Fails(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                raise RuntimeError("no evaluation")
            return super().forward(x)

    net = Fails(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).train()
    with pytest.raises(esper.errors.ProbeError, match="no evaluation"):
        esper.wrap(net, torch.randn(3, 2))
    assert all(m.training for m in net.modules())
    assert type(net[0]) is nn.Linear
