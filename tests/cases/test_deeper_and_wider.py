"""One event inserts a block and widens the layers inside its like: it is saved, averaged and replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.errors import SurgeryError
from esper.surgery import widen_layers
from tests.cases.loops import Ran, run


class Residual(nn.Module):
    """A block that a race could widen inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(10, 1), nn.Linear(1, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def host() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Residual(), Residual(), nn.Linear(10, 10))


def grown(net: nn.Sequential, folder: Path) -> tuple[Ran, AveragedModel]:
    """Train a host, saving it after every event."""
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    folders = iter(range(100))

    def each(step: int, growth: esper.Growth) -> None:
        average.update_parameters(net)
        if step % 10 == 9:
            growth.save(folder / str(next(folders)))

    made = run(net, each=each, ema=average, steps=120)
    made.growth.save(folder / "last")
    return made, average


def both(made: Ran) -> set[int]:
    """Return the steps at which blocks came and layers became wider."""
    steps = {kind: {e.step for e in made.events if e.kind == kind} for kind in ("deepened", "widened")}
    return steps["deepened"] & steps["widened"]


def test_it_is_saved_and_its_average_follows(tmp_path: Path) -> None:
    net = host()
    made, average = grown(net, tmp_path)
    assert both(made)
    x = torch.randn(8, 10)
    again = esper.load_into(host(), tmp_path / "last")
    assert torch.equal(again(x), net(x))
    shapes = {name: one.shape for name, one in net.state_dict().items()}
    assert {name: one.shape for name, one in average.module.state_dict().items()} == shapes
    assert average(x).isfinite().all()


def test_a_place_that_cannot_be_widened_leaves_the_blocks_of_its_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, own, deep = host(), widen_layers.widen, list[str]()

    def widen(model: nn.Module, plan: object, *rest: object) -> object:
        if len(net) > 3 and getattr(plan, "site", "") == "0.up>0.down":
            deep.append("0.up>0.down")
            raise SurgeryError("not this one")
        return own(model, plan, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("esper.tolaria.growth.run.commit.widen", widen)
    made, _ = grown(net, tmp_path)
    assert deep
    assert len(net) > 3
    assert any("not this one" in one for one in made.reasons)
    assert "0+block" in {one["site"] for one in made.outcomes() if one["kept"]}
    x = torch.randn(8, 10)
    assert torch.equal(esper.load_into(host(), tmp_path / "last")(x), net(x))
