"""Every optimizer and scheduler of torch goes on bit for bit; one that is new in torch is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from esper.checkpoint import CheckpointManager, MemoryStorage, Run

OPTIMIZERS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
)
SCHEDULERS = sorted(
    name
    for name, kind in vars(lr_scheduler).items()
    if isinstance(kind, type) and issubclass(kind, LRScheduler) and kind is not LRScheduler and name[0] != "_"
)
NEEDS: dict[str, Any] = {
    "LambdaLR": lambda o: [lambda step: 0.9**step],
    "MultiplicativeLR": lambda o: [lambda step: 0.9],
    "StepLR": lambda o: [2],
    "MultiStepLR": lambda o: [[2, 4]],
    "ExponentialLR": lambda o: [0.9],
    "CosineAnnealingLR": lambda o: [6],
    "CosineAnnealingWarmRestarts": lambda o: [2],
    "CyclicLR": lambda o: [0.01, 0.1, 2],
    "OneCycleLR": lambda o: [0.1, 8],
    "SequentialLR": lambda o: [[lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.StepLR(o, 2)], [3]],
}


class Short:
    """A few steps of a small net."""

    def __init__(self, storage: Any, kind: str = "SGD", scheduler: str = "StepLR") -> None:
        torch.manual_seed(0)
        sparse = kind == "SparseAdam"
        self.net: nn.Module = (
            nn.Embedding(6, 2, sparse=True) if sparse else nn.Sequential(nn.Linear(3, 2, bias=False))
        )
        make: Any = getattr(torch.optim, kind)
        more = {"momentum": 0.9} if kind == "SGD" else {}
        self.optimizer = make(self.net.parameters(), lr=0.01, **more)
        if scheduler == "ChainedScheduler":
            self.scheduler: Any = lr_scheduler.ChainedScheduler(
                [lr_scheduler.ConstantLR(self.optimizer, 0.5, 2), lr_scheduler.StepLR(self.optimizer, 2)]
            )
        else:
            given = NEEDS.get(scheduler, lambda o: [])(self.optimizer)
            self.scheduler = getattr(lr_scheduler, scheduler)(self.optimizer, *given)
        run = Run(self.net, self.optimizer, others={"scheduler": self.scheduler})
        self.manager = CheckpointManager(storage, run, every=10**9)

    def loss(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        shape = isinstance(self.net, nn.Embedding)
        x = torch.randint(6, (4,)) if shape else torch.randn(4, 3)
        loss = self.net(x).square().mean()
        loss.backward()
        return loss

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = self.optimizer.step(self.loss)
            plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(loss.detach()) if plateau else self.scheduler.step()


@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step:UserWarning")  # torch's SequentialLR
@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [(name, "StepLR") for name in OPTIMIZERS] + [("SGD", name) for name in SCHEDULERS if name != "StepLR"],
)
def test_it_goes_on_bit_for_bit(optimizer: str, scheduler: str) -> None:
    whole, storage = Short(MemoryStorage(), optimizer, scheduler), MemoryStorage()
    whole.train(7)
    cut = Short(storage, optimizer, scheduler)
    cut.train(3)
    cut.manager.save(wait=True)
    again = Short(storage, optimizer, scheduler)
    again.manager.resume()
    again.train(4)
    ours, theirs = again.net.state_dict(), whole.net.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    rates = [[group["lr"] for group in one.optimizer.param_groups] for one in (whole, again)]
    assert rates[0] == rates[1]
