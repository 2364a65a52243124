"""A block and what is inside blocks grow at one event, block first, so a saved plan says what it is like."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.cli.output import growth_lines
from esper.contracts import Event
from esper.errors import SurgeryError
from esper.kasmina.depth.deepen import duplicate, insert
from esper.kasmina.depth.stacks import find_stacks
from esper.nissa.run.history import fold
from esper.tolaria.growth.early.reach import NO_BLOCK_FITS

STEPS = 120


class Residual(nn.Module):
    """Far narrower inside than its stream: its inside may grow at the last events, too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 1), nn.Linear(1, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(self.norm(x))))


def in_a_container() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Sequential(Residual(), Residual()), nn.Linear(16, 1))


def in_the_model_itself() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), Residual(), Residual(), nn.Linear(16, 1))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("made", [in_a_container, in_the_model_itself])
def test_what_is_inside_grows_behind_the_block_and_is_saved_and_averaged(made, tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(800, 8)
    targets = (torch.sin(2 * inputs[:, :1]) * inputs[:, 1:2] + inputs[:, 2:3].abs()).detach()
    net = made()
    small, average = copy.deepcopy(net), AveragedModel(net)
    told = list[Event]()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    growth = esper.grow(
        net, optimizer, loss_fn, probe=[(inputs[600:], targets[600:])], steps=STEPS, ema=average,
        budget={"growth_factor": 40.0}, config={"early": {"false_keep": 0.9, "further": 0.9}},
        on_event=told.append,
    )  # fmt: skip
    for _ in range(STEPS):
        rows = torch.randint(600, (32,))
        loss = loss_fn(net, (inputs[rows], targets[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        growth.step((inputs[rows], targets[rows]), loss)
    growth.finish()
    events = growth.report().events
    with_block = [one for one in events if any("+block" in o.site and o.grown for o in one.looked)]
    inside = [o for one in with_block for o in one.looked if o.grown and ".a>" in o.site]
    assert inside, "at an event with a block nothing inside grew: the test tests nothing"
    assert {k: v.shape for k, v in average.module.state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()
    }
    blocks = [m for m in net.modules() if isinstance(m, Residual)]
    (stack,) = [widths for site, widths in fold(told).widths.items() if site.endswith("+block")]
    assert stack == (2, len(blocks))
    said = "\n".join(growth_lines(fold(told)))
    assert f"+block has {len(blocks)} blocks, it had 2" in said
    growth.save(tmp_path / "grown")
    esper.load_into(small, tmp_path / "grown")
    assert torch.equal(small.eval()(inputs), net.eval()(inputs))


def test_a_block_drawn_before_its_like_became_wider_is_refused() -> None:
    net = in_a_container()
    (stack,), _ = find_stacks(net, lambda: net(torch.randn(4, 8)), 4)
    plan, block = stack.deepening(), duplicate(net, stack.site.exit)
    donor = net.get_submodule(stack.site.exit)
    donor.a, donor.b = nn.Linear(16, 3), nn.Linear(3, 16)
    with pytest.raises(SurgeryError, match=r"a\.weight is \(1, 16\) in it and \(3, 16\) there"):
        insert(net, plan, block)
    assert len(net[1]) == 2


def test_a_block_that_does_not_fit_the_budget_is_not_said_to_wait() -> None:
    torch.manual_seed(0)
    net = in_a_container()
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    inputs = torch.randn(400, 8)
    held = [(inputs[200:], inputs[200:, :1].sin())]
    room = {"parameters": sum(p.numel() for p in net.parameters()) + 40}  # a block has 81
    growth = esper.grow(net, optimizer, loss_fn, probe=held, steps=60, budget=room)
    for _ in range(60):
        loss = loss_fn(net, (inputs[:200], inputs[:200, :1].sin()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step((inputs[:200], inputs[:200, :1].sin()), loss)
    said = {o.reason for one in growth.report().events for o in one.looked if "+block" in o.site}
    assert said == {NO_BLOCK_FITS}
    assert "1+block (2 blocks): the budget leaves no room for another block" in str(growth)
