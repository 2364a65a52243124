"""Several blocks at one event, and the second cannot come: nothing of any is left, bit for bit."""

from __future__ import annotations

import copy
import random
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import esper
from tests.cases.loops import Task, cross_entropy

WIDE = 32
ORDER = ("first+block", "second+block")


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(WIDE), nn.Linear(WIDE, 4), nn.Linear(4, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Refusing(Block):
    """Knows its number, and may refuse to be told it or to be copied."""

    refuses: ClassVar[dict[str, BaseException]] = {}

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_idx = number

    def __setattr__(self, name: str, value: Any) -> None:
        """Set, or refuse."""
        if name == "layer_idx" and "number" in self.refuses:
            raise self.refuses["number"]
        super().__setattr__(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy, or refuse."""
        if "copy" in self.refuses:
            raise self.refuses["copy"]
        made = memo[id(self)] = type(self).__new__(type(self))
        made.__dict__.update({name: copy.deepcopy(one, memo) for name, one in self.__dict__.items()})
        return made


class Net(nn.Module):
    """Two stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.head = nn.Linear(10, WIDE), nn.Linear(WIDE, 10)
        self.first = nn.ModuleList([Block()])
        self.second = nn.ModuleList([Refusing(0), Refusing(1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        for block in (*self.first, *self.second):
            x = block(x)
        return self.head(x)


def bits(net: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> list[Any]:
    """Copy all that an event may change."""
    optimizers = optimizer.state_dict()
    numbers = [t.clone() for t in (*net.state_dict().values(), *average.state_dict().values())]
    numbers += [t.clone() for state in optimizers["state"].values() for t in state.values()]
    names = [*net.state_dict(), *average.state_dict(), *dict(net.named_modules())]
    streams = [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy())]  # type: ignore[index]
    groups = [group["params"] for group in optimizers["param_groups"]]
    return [numbers + streams, names, random.getstate(), groups]


@pytest.mark.parametrize("what", ["number", "copy"])
@pytest.mark.parametrize(
    "error", [RuntimeError("x"), KeyError("x"), AssertionError("x"), KeyboardInterrupt()]
)
def test_what_the_second_refuses_takes_the_first_back(
    what: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net, draw = Net(), Task()
    average = AveragedModel(net, use_buffers=True)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    growth = esper.grow(
        net, optimizer, cross_entropy, probe=[draw(64)], steps=30, ema=average, growth="early",
        budget={"growth_factor": 8.0},
    )  # fmt: skip

    def step() -> None:
        batch = draw()
        loss = cross_entropy(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(net)
        growth.step(batch, loss)

    step()
    early, places = growth.loop.early, growth.run.morphable.places
    assert early is not None
    kernels: dict[str, Any] = {name: places[name].kernel() for name in ORDER}
    before = early.insertion.remember(1)
    held = bits(net, average, optimizer)
    monkeypatch.setitem(Refusing.refuses, what, error)
    if isinstance(error, Exception):
        _, failures = early.insertion.carry_out(kernels, dict.fromkeys(ORDER, 2), before, {})
        assert failures.keys() == set(ORDER)
    else:
        with pytest.raises(KeyboardInterrupt):
            early.insertion.carry_out(kernels, dict.fromkeys(ORDER, 2), before, {})
        early.insertion.restore(before)  # as the event does
    monkeypatch.undo()
    (numbers, *facts), (known, *others) = bits(net, average, optimizer), held
    assert facts == others
    assert all(map(torch.equal, numbers, known))
    for _ in range(28):
        step()
    growth.finish()
    assert net(draw()[0]).isfinite().all()
