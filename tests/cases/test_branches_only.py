"""A model whose layers cannot be widened: the early recipe says so, and a scripted part is stepped around."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.cases.loops import run

SCRIPTED = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def test_the_early_recipe_says_that_it_grows_no_branches() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 3), nn.Softmax(-1), nn.Linear(3, 10))
    made = run(net, growth="early")
    assert any("nothing will grow: growth='early' widens" in one for one in made.warnings)
    assert made.reasons
    assert all("a branch is raced beside its layer" in one for one in made.reasons)


@SCRIPTED
def test_a_host_with_a_scripted_part_grows_beside_it() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Tanh(), nn.Linear(10, 10)))
    net = nn.Sequential(
        nn.Linear(10, 1), nn.Tanh(), nn.Linear(1, 10), torch.jit.script(nn.Tanh()), scripted, nn.Tanh()
    )
    made = run(net)
    assert net[0].out_features > 1
    reasons = {one.place: one.reason for one in made.growth.run.morphable.refusals}
    assert "TorchScript" in reasons["4.1"]


@SCRIPTED
def test_where_only_branches_fit_a_scripted_part_is_no_end_of_a_span() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Tanh(), nn.Linear(2, 3)))
    net = nn.Sequential(nn.Linear(10, 2), scripted, torch.jit.script(nn.Tanh()), nn.Linear(3, 10))
    made = run(net, growth="incubate")
    places = list(made.growth.run.morphable.places)
    assert places
    assert all(one.startswith(("0", "3")) and ":" not in one for one in places)
