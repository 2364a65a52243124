"""Every optimizer with every scheduler, an EMA, clipping and accumulation, alive across three widenings."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esper.kasmina.materialise import widen
from esper.tolaria.surgery.averages import widen_average
from esper.tolaria.surgery.optimizers import widen_state

Parameters = Iterable[nn.Parameter] | list[dict[str, Any]]

OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "SGD": lambda ps: SGD(ps, lr=0.05),
    "SGD momentum": lambda ps: SGD(ps, lr=0.05, momentum=0.9),
    "SGD foreach": lambda ps: SGD(ps, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "Adam": lambda ps: Adam(ps, lr=0.05, foreach=False),
    "Adam foreach": lambda ps: Adam(ps, lr=0.05, foreach=True),
    "Adam amsgrad": lambda ps: Adam(ps, lr=0.05, amsgrad=True),
    "AdamW": lambda ps: AdamW(ps, lr=0.05),
    "AdamW foreach": lambda ps: AdamW(ps, lr=0.05, foreach=True),
    "AdamW fused": lambda ps: AdamW(ps, lr=0.05, fused=True),
    "RMSprop": lambda ps: RMSprop(ps, lr=0.003, momentum=0.9, centered=True),
    "Adagrad": lambda ps: Adagrad(ps, lr=0.05),
}
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda o: StepLR(o, step_size=3, gamma=0.5),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=20),
    "OneCycleLR": lambda o: OneCycleLR(
        o, max_lr=[0.05, 0.1], total_steps=20, cycle_momentum=bool({"momentum", "betas"} & set(o.defaults))
    ),
    "LambdaLR": lambda o: LambdaLR(o, [lambda step: 0.9**step, lambda step: 0.8**step]),
}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    return [
        {"params": [p for p in named.values() if p.dim() > 1]},
        {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0},
    ]


class Training:
    """What a user's loop holds: everything here outlives a widening."""

    def __init__(self, model: nn.Module, optimizer: str, scheduler: str) -> None:
        self.model = model
        self.optimizer = OPTIMIZERS[optimizer](two_groups(model))
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.held = list(model.parameters())
        self.loss: Tensor | None = None

    def step(self) -> None:
        """Two micro-batches, clipping, one step of everything."""
        self.optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(16, 4)
            self.loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean() / 2
            self.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.held, 1.0)
        assert norm > 0
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.model)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_across_three_widenings(
    host: nn.Module, plan_of: Callable, slices_of: Callable, optimizer: str, scheduler: str
) -> None:
    grown = Training(host, optimizer, scheduler)
    twin = Training(copy.deepcopy(host), optimizer, scheduler)
    for old, new in ((3, 5), (5, 6), (6, 10)):
        for _ in range(3):
            grown.step()
            twin.step()
            assert [g["lr"] for g in grown.optimizer.param_groups] == [
                g["lr"] for g in twin.optimizer.param_groups
            ]
        grow_and_check_state(grown, plan_of(old, new), slices_of)
    before = {name: p.clone() for name, p in host.named_parameters()}
    averaged = {name: p.clone() for name, p in grown.ema.module.named_parameters()}
    grown.step()

    assert all(mine is theirs for mine, theirs in zip(grown.held, host.parameters(), strict=True))
    assert host.head.weight is host.embed.weight
    assert host.fc1.weight.shape == (10, 4)
    assert not torch.equal(host.fc2.weight[:, 6:], before["fc2.weight"][:, 6:])  # the newest units learn
    assert all(p.isfinite().all() for p in host.parameters())
    for name, mean in grown.ema.module.named_parameters():
        expected = averaged[name].lerp(dict(host.named_parameters())[name], 0.1)
        torch.testing.assert_close(mean, expected)
    assert grown.ema.module.norm.running_mean.shape == (10,)


def grow_and_check_state(training: Training, plan: Any, slices_of: Callable) -> None:
    model, optimizer = training.model, training.optimizer
    named = dict(model.named_parameters())
    before = {n: {k: copy.deepcopy(v) for k, v in optimizer.state[p].items()} for n, p in named.items()}
    slices = slices_of(model, plan)
    widened = widen(model, plan, slices)  # while `training.loss` is alive
    widen_average(training.ema, plan, slices)
    assert widened.replaced == ()
    assert widen_state({"main": optimizer}, widened.changes, "zeros") == []
    axes = {edit.name: edit for edit in plan.edits}
    for name, parameter in named.items():
        for key, value in optimizer.state[parameter].items():
            old = before[name][key]
            if name in axes and isinstance(old, Tensor) and old.dim():
                edit = axes[name]
                assert value.shape == parameter.shape
                kept, new = value.split([edit.old, edit.new - edit.old], edit.axis)
                assert torch.equal(kept, old)
                assert not new.any()
            else:
                assert (
                    value is None
                    if old is None
                    else torch.equal(torch.as_tensor(value), torch.as_tensor(old))
                )
