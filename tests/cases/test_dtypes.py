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
