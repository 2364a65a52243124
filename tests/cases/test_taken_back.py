"""An event is taken back only where the model is still the one it grew: else it stays, and says why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import esper
from tests.cases.loops import Ran, Task, run

CHANGES: dict[str, tuple[Callable[[nn.Sequential], object], str]] = {
    "parametrised": (lambda net: weight_norm(net[0]), "0.weight is not in the model any more"),
    "pruned": (
        lambda net: prune.l1_unstructured(net[3], "weight", 1),
        "3.weight is not in the model any more",
    ),
    "a layer between": (lambda net: net.insert(1, nn.Dropout(0.0)), "1 was replaced or removed since"),
    "a norm folded away": (lambda net: net.__setitem__(1, nn.Identity()), "1 was replaced or removed since"),
    "without a bias": (lambda net: net[0].register_parameter("bias", None), "0.bias is not in the model"),
    "another head": (
        lambda net: net.__setitem__(4, nn.Linear(net[4].in_features, 12)),
        "4 was replaced or removed since",
    ),
    "a weight of another size": (
        lambda net: wider(net[4]),
        "4.weight has another shape than it grew to",
    ),
}


def wider(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.randn(12, layer.in_features))
    layer.bias = nn.Parameter(torch.zeros(12))


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 1), nn.BatchNorm1d(1), nn.Tanh(), nn.Linear(1, 10), nn.Linear(10, 10)
    )  # fmt: skip


def spoilt(change: Callable[[nn.Sequential], object]) -> tuple[nn.Sequential, Ran, int]:
    """Change a host between an event and its judgement, and make it so bad that it would be taken back."""
    net, width = host(), []
    optimizer = torch.optim.SGD(net.parameters(), 0.01)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0].to(next(model.parameters()).dtype)), batch[1])

    def each(step: int, growth: esper.Growth) -> None:
        if growth.events_kept and not width:
            width.append(net[0].out_features)
            change(net)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(torch.randn_like(parameter) * 5)

    made = run(net, loss, Task(), each=each, optimizer=optimizer)
    return net, made, width[0]


@pytest.mark.parametrize("kind", CHANGES)
def test_what_the_user_changed_since_is_not_overwritten(kind: str) -> None:
    change, reason = CHANGES[kind]
    net, made, width = spoilt(change)
    assert net[0].out_features == net[0].weight.shape[0] >= width > 1
    assert "taken_back" not in [event.kind for event in made.events]
    reasons = [one["reason"] for one in made.outcomes() if "not taken back" in one["reason"]]
    assert reasons
    assert all(reason in one for one in reasons)
    assert not any("KeyError" in one for one in made.warnings)
    assert net(torch.randn(4, 10)).isfinite().all()


@pytest.mark.parametrize("kind", ["nothing", "double", "another layer behind"])
def test_what_is_no_obstacle_is_taken_back(kind: str) -> None:
    changes: dict[str, Callable[[nn.Sequential], object]] = {
        "nothing": lambda net: None,
        "double": lambda net: net.double(),
        "another layer behind": lambda net: net.append(nn.Linear(10, 10)),
    }
    net, made, _ = spoilt(changes[kind])
    (back,) = [event.data for event in made.events if event.kind == "taken_back"][:1]
    assert back["now"] > back["before"]
    assert len({parameter.dtype for parameter in net.parameters()}) == 1
