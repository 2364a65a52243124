"""The README's loop with all that users hold, grown by the product itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper

STEPS, CLASSES = 240, 10
Parameters = Iterable[nn.Parameter] | list[dict[str, Any]]

OPTIMIZERS: dict[str, Callable[[Parameters], Optimizer]] = {
    "SGD momentum": lambda ps: SGD(ps, lr=0.1, momentum=0.9),
    "Adam": lambda ps: Adam(ps, lr=0.01),
    "Adam amsgrad": lambda ps: Adam(ps, lr=0.01, amsgrad=True, foreach=True),
    "AdamW": lambda ps: AdamW(ps, lr=0.01),
    "AdamW fused": lambda ps: AdamW(ps, lr=0.01, fused=True),
    "RMSprop": lambda ps: RMSprop(ps, lr=0.003),
    "Adagrad": lambda ps: Adagrad(ps, lr=0.1),
}
SCHEDULERS: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "StepLR": lambda o: StepLR(o, step_size=100, gamma=0.8),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, T_max=STEPS * 2),
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=o.param_groups[0]["lr"], total_steps=STEPS + 1),
    "LambdaLR": lambda o: LambdaLR(o, lambda step: 0.999**step),
}
PAIRS = [
    ("SGD momentum", "StepLR"),
    ("Adam", "OneCycleLR"),
    ("AdamW", "CosineAnnealingLR"),
    ("AdamW fused", "LambdaLR"),
]
PAIRS += [("Adam amsgrad", "LambdaLR"), ("RMSprop", "StepLR"), ("Adagrad", "CosineAnnealingLR")]


class Clusters(nn.Module):
    """One unit for ten classes is far too narrow; behind the pair two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(CLASSES, 1), nn.Linear(1, CLASSES)
        self.embed, self.head = (nn.Linear(CLASSES, CLASSES, bias=False) for _ in range(2))
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.embed.weight.copy_(torch.eye(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(self.fc2(torch.tanh(self.fc1(x)))))


def clusters(examples: int) -> tuple[Tensor, Tensor]:
    label = torch.randint(CLASSES, (examples,))
    return 2 * torch.eye(CLASSES)[label] + 0.5 * torch.randn(examples, CLASSES), label


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize(("optimizer_name", "scheduler_name"), PAIRS)
def test_everything_alive_in_the_loop_survives_growth(
    optimizer_name: str, scheduler_name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Clusters()
    plain = copy.deepcopy(net)
    held, names, tied = list(net.parameters()), [n for n, _ in net.named_parameters()], net.embed.weight
    optimizer = OPTIMIZERS[optimizer_name](held)
    scheduler = SCHEDULERS[scheduler_name](optimizer)
    idle = OPTIMIZERS[optimizer_name](list(plain.parameters()))
    expected = SCHEDULERS[scheduler_name](idle)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    probe = [clusters(256)]

    growth = esper.grow(
        net,
        optimizer,
        loss_fn,
        probe=probe,
        steps=STEPS,
        schedulers=[scheduler],
        ema=[ema],
        budget={"growth_factor": 12.0, "growth_events": 6},  # several widenings, whatever the scheduler does
        config={"widths": {"shares": [0.5]}},
    )
    idle.step()
    loss = None
    for _ in range(STEPS):
        batches = [clusters(48), clusters(48)]
        optimizer.zero_grad()
        for index, batch in enumerate(batches):
            loss = loss_fn(net, batch)
            (loss / 2).backward()
            if index == 1:
                nn.utils.clip_grad_norm_(held, 5.0)
                optimizer.step()
                scheduler.step()
                expected.step()
                ema.update_parameters(net)
            growth.step(batch, loss)
        assert optimizer.param_groups[0]["lr"] == idle.param_groups[0]["lr"]
    assert growth.finish() is net

    assert len(growth.plans) >= (3 if optimizer_name == "Adam" else 1), "too little grew to show anything"
    units = 1 + sum(plan.units for plan in growth.plans)
    assert net.fc1.weight.shape == (units, CLASSES)
    assert net.fc1.out_features == net.fc2.in_features == units
    assert [n for n, _ in net.named_parameters()] == names
    assert all(mine is theirs for mine, theirs in zip(held, net.parameters(), strict=True))
    assert net.head.weight is net.embed.weight is tied
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in net.parameters()]
    for parameter in held:
        for value in optimizer.state[parameter].values():
            assert not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    with torch.no_grad():
        x, y = probe[0]
        assert loss_fn(net, (x, y)) < 0.8 * loss_fn(plain, (x, y))
        folder = growth.save(tmp_path / "grown")
        assert torch.equal(esper.load_into(plain, folder)(x), net(x))
