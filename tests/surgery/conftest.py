"""A host with a pair to widen and a tied pair to leave alone, with hand-made plans."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper.contracts import WidenEdit, WidenPlan


class Host(nn.Module):
    """`fc1 > fc2` may grow; `embed` and `head` share one weight."""

    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.fc2 = nn.Linear(hidden, 5)
        self.embed = nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(torch.tanh(self.norm(self.fc1(x))))
        return self.head(torch.tanh(self.embed(x)))


def make_plan(old: int, new: int) -> WidenPlan:
    names = ["fc1.weight", "fc1.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    edits = [WidenEdit(name, 0, old, new, "") for name in names]
    edits.append(WidenEdit("fc2.weight", 1, old, new, ""))
    attributes = (("fc1", "out_features", new), ("norm", "num_features", new), ("fc2", "in_features", new))
    return WidenPlan("fc1>fc2", new - old, tuple(edits), attributes)


def make_slices(model: nn.Module, plan: WidenPlan) -> dict[str, Tensor]:
    """Random new units; the consumer's columns are zero, so that the function stays the same."""
    slices = {}
    for edit in plan.edits:
        shape = list(model.state_dict()[edit.name].shape)
        shape[edit.axis] = edit.new - edit.old
        slices[edit.name] = torch.zeros(shape) if edit.axis else torch.rand(shape) + 0.5
    return slices


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def new_host() -> Callable[[], Host]:
    return Host


@pytest.fixture
def plan_of() -> Callable[[int, int], WidenPlan]:
    return make_plan


@pytest.fixture
def slices_of() -> Callable[[nn.Module, WidenPlan], dict[str, Tensor]]:
    return make_slices
