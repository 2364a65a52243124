"""Layers that compute in numbers of different steps: the coarser ones round, and that is no fault."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.errors import SurgeryError
from esper.tolaria.growth.run.check import deviation
from tests.cases.loops import Task, narrow, run

PAIRS = [
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]


class Mixed(nn.Module):
    """Two layers, each in a dtype of its own."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(10, 1, dtype=first), nn.Linear(1, 10, dtype=second)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x.to(self.a.weight.dtype)))
        return self.b(y.to(self.b.weight.dtype))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


@pytest.mark.parametrize("growth", ["early", "incubate"])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_layers_of_two_dtypes_grow(pair: tuple[torch.dtype, torch.dtype], growth: str) -> None:
    net = Mixed(*pair)
    made = run(net, loss, Task(), growth=growth, steps=120)
    assert not [one for one in made.outcomes() if "put back" in one["reason"]]
    assert net.a.out_features > 1
    assert (net.a.weight.dtype, net.b.weight.dtype) == pair


class Partly(nn.Module):
    """A part under autocast: what leaves it is rounded more coarsely than any tensor is written."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(10, 3), nn.Linear(3, 4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.b(torch.tanh(self.a(x)))
        return self.c(torch.relu(x.float()))


@pytest.mark.parametrize("site", ["a>b", "b>c", "b+residual_mlp"])
def test_a_part_under_autocast_grows_in_a_race(site: str) -> None:
    blueprint = site.partition("+")[2] or "widen"
    ran = run(
        Partly(), draw=Task(), growth="incubate", steps=120, sites=site, budget={"growth_factor": 200.0},
        config={"blueprints": [blueprint], "race": {"steps": 12}, "gate": {"false_keep": 0.99}},
    )  # fmt: skip
    assert [one for one in ran.outcomes() if one["kept"]], ran.warnings
    assert not [one for one in ran.outcomes() if "put back" in one["reason"]]


NORMS = {"BatchNorm": lambda: nn.BatchNorm1d(4), "GroupNorm": lambda: nn.GroupNorm(2, 4)}


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_in_finer_numbers_than_its_layers_keeps_them(norm: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 4), NORMS[norm](), nn.Tanh(), nn.Linear(4, 10)).bfloat16()
    net[1].float()
    draw = Task()

    def half(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        y = model[1](model[0](batch[0].bfloat16()).float())  # type: ignore[operator]
        return F.cross_entropy(model[3](model[2](y).bfloat16()).float(), batch[1])  # type: ignore[operator]

    run(net, half, draw, growth="early", steps=120)
    assert len(net[1].weight) == net[0].out_features > 4
    assert {one.dtype for one in net[1].parameters()} == {torch.float32}


def test_a_model_whose_dtype_changes_while_a_seed_is_awake_grows() -> None:
    net = narrow()

    def cast(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0].to(net[0].weight.dtype)), batch[1])

    def each(step: int, growth: esper.Growth) -> None:
        if any(one.origin.layer.exposed for one in growth.run.orchestrator.trials.values()):
            net.double()

    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    made = run(net, cast, Task(), growth="incubate", steps=120, each=each, optimizer=optimizer)
    assert net[0].weight.dtype == torch.float64
    assert [one for one in made.outcomes() if one["kept"]]
    assert not [one for one in made.outcomes() if "put back" in one["reason"]]


def test_what_differs_by_more_than_the_coarsest_layer_rounds_is_refused() -> None:
    layer = nn.Linear(2, 2)
    said = torch.ones(4, dtype=torch.float64)
    assert deviation(said, said + 1e-7, (layer,)) > 0
    with pytest.raises(SurgeryError, match="is rounding"):
        deviation(said, said + 1e-7)
    with pytest.raises(SurgeryError, match="is rounding"):
        deviation(said, said + 1e-5, (layer,))
