"""A run that went astray and was put back goes on as the one that did not, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from esper.errors import StateError
from esper.tolaria.governor import Snapshots

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW capturable lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


class Run:
    """A net with everything that has state: BatchNorm, dropout, an average, a scheduler, three streams."""

    def __init__(self, optimizer: str = "Adam") -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 2)
        )
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.average = swa_utils.AveragedModel(self.net, use_buffers=True)
        self.scheduler = (
            lr_scheduler.OneCycleLR(
                self.optimizer, 0.05, total_steps=100, cycle_momentum="betas" not in self.optimizer.defaults
            )
            if optimizer in ("SGD", "Adam")
            else lr_scheduler.StepLR(self.optimizer, 3)
        )
        self.counter = [0]
        self.snapshots = Snapshots(
            [self.net, self.average],
            {"optimizer": self.optimizer},
            [self.scheduler],
            {"counter": (lambda: list(self.counter), lambda value: self.counter.__setitem__(0, value[0]))},
        )

    def train(self, steps: int, spoil: float = 1.0) -> list[float]:
        losses = []
        for _ in range(steps):
            x = torch.randn(16, 4) * float(np.random.rand() + random.random())

            def closure(x: Tensor = x) -> Tensor:
                self.optimizer.zero_grad()
                loss = (self.net(x) - x[:, :2]).square().mean()
                (spoil * loss).backward()
                return loss

            loss = self.optimizer.step(closure)
            losses.append(float(loss.detach()))
            self.average.update_parameters(self.net)
            self.scheduler.step()
            self.counter[0] += 1
        return losses

    def bits(self) -> list[Tensor]:
        found = [t.clone() for t in (*self.net.state_dict().values(), *self.average.state_dict().values())]
        for state in self.optimizer.state_dict()["state"].values():
            found += [v.clone() for v in state.values() if isinstance(v, Tensor)]
        return [*found, torch.tensor(self.scheduler.get_last_lr()), torch.tensor(self.counter)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 5])
def test_a_run_put_back_goes_on_as_if_nothing_had_been(name: str, before: int) -> None:
    run = Run(name)
    run.train(before)
    taken = run.snapshots.take(before)
    assert taken is not None
    assert taken.nbytes > 0
    at, identities = run.bits(), [id(p) for p in run.net.parameters()]
    held = {id(p): dict(state) for p, state in run.optimizer.state.items()}
    losses = run.train(6)
    end = run.bits()
    run.train(3, spoil=float("nan"))
    run.snapshots.restore(taken)
    assert same(run.bits(), at)
    assert [id(p) for p in run.net.parameters()] == identities
    for parameter, state in run.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and name != "LBFGS":
                assert value is held[id(parameter)][key]  # written into, not exchanged
    assert run.train(6) == losses
    assert same(run.bits(), end)


def test_a_snapshot_can_be_gone_back_to_twice() -> None:
    run = Run()
    run.train(3)
    taken = run.snapshots.take(3)
    assert taken is not None
    at = run.bits()
    for _ in range(2):
        run.train(4)
        run.snapshots.restore(taken)
        assert same(run.bits(), at)


def test_the_way_back_leads_a_little_before_the_first_evidence() -> None:
    run = Run()
    for step in (0, 100, 200):
        run.snapshots.take(step)
    assert [s.step for s in run.snapshots.ring] == [100, 200]
    steps = {since: getattr(run.snapshots.before(since), "step", None) for since in (50, 100, 150, 201, 204)}
    assert steps == {50: None, 100: None, 150: 100, 201: 100, 204: 200}
    taken = run.snapshots.ring[0]
    run.snapshots.restore(taken)
    assert list(run.snapshots.ring) == [taken]


def test_what_is_lost_already_is_not_kept() -> None:
    run = Run()
    with torch.no_grad():
        next(run.net.parameters())[0, 0] = torch.nan
    assert run.snapshots.take(1) is None
    assert not run.snapshots.ring


@pytest.mark.parametrize("grow", ["shape", "group", "buffer"])
def test_a_snapshot_of_another_topology_is_refused_and_nothing_changes(grow: str) -> None:
    run = Run()
    run.train(2)
    taken = run.snapshots.take(2)
    assert taken is not None
    if grow == "shape":
        run.net[4] = nn.Linear(8, 3)
    elif grow == "group":
        run.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    else:
        run.net.register_buffer("new", torch.zeros(2))
    assert run.snapshots.before(50) is None
    state: Any = [t.clone() for t in run.net.state_dict().values()]
    with pytest.raises(StateError, match="does not fit any more"):
        run.snapshots.restore(taken)
    assert same(state, list(run.net.state_dict().values()))
