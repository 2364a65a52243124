"""The user's path, from wrap to unwrap, through three real growths with everything alive that users hold."""

from __future__ import annotations

import copy
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.errors import FinishedError, LossError, SiteError
from tests.cases.loops import train

STEPS, CLASSES = 400, 10


class Net(nn.Module):
    """Two pairs far too narrow for ten classes, and a weight shared by two layers behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(CLASSES, 2), nn.BatchNorm1d(2), nn.Linear(2, 4)
        self.fc3 = nn.Linear(4, CLASSES)
        self.embed, self.head = (nn.Linear(CLASSES, CLASSES, bias=False) for _ in range(2))
        self.head.weight = self.embed.weight
        nn.init.eye_(self.embed.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc2(torch.relu(self.norm(self.fc1(x)))))
        return self.head(self.embed(self.fc3(x)))


def clusters(examples: int) -> tuple[Tensor, Tensor]:
    label = torch.randint(CLASSES, (examples,))
    return 2 * torch.eye(CLASSES)[label] + 0.5 * torch.randn(examples, CLASSES), label


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_from_wrap_to_unwrap_through_three_growths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    start = copy.deepcopy(net)
    wrapped = esper.wrap(net, clusters(8)[0])
    assert list(wrapped.pairs) == ["fc1>fc2", "fc2>fc3"]
    printed = str(esper.summary(wrapped))
    assert "fc1>fc2" in printed
    assert "tied to" in printed
    assert esper.unwrap(wrapped) is net

    held, names, tied = list(net.parameters()), list(net.state_dict()), net.embed.weight
    numbers = [id(p) for p in held]
    optimizer = torch.optim.Adam(held, lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    probe, seen, losses = [clusters(1024)], [], []

    growth = esper.grow(
        net,
        optimizer,
        loss_fn,
        probe=probe,
        steps=STEPS,
        schedulers=[scheduler],
        ema=[ema],
        budget={"growth_factor": 5.0, "growth_events": 5},
        run_dir=tmp_path / "run",
        on_event=seen.append,
    )
    for step in range(STEPS):
        batch = clusters(48)
        loss = loss_fn(net, batch)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(held, 5.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(net)
        growth.step(batch, loss)
        if step % 100 == 99:
            growth.epoch({"loss": float(torch.stack(losses[-100:]).mean())})
    assert growth.finish() is net

    assert len(growth.plans) >= 3, "three real growths were to be shown"
    assert list(net.state_dict()) == names
    assert [id(p) for p in net.parameters()] == numbers, "held parameters are the model's own"
    assert net.head.weight is net.embed.weight is tied
    assert scheduler.get_last_lr() == pytest.approx([0.0], abs=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.param_groups[0]["params"], held, strict=True))
    for parameter in held:
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in net.parameters()]
    assert {type(module).__module__.split(".")[0] for module in net.modules()} <= {
        "torch",
        __name__.split(".")[0],
    }
    assert not [k for module in net.modules() for k in module.__dict__ if "esper" in k]
    widths = {"fc1>fc2": 2, "fc2>fc3": 4}
    for plan in growth.plans:
        widths[plan.site] += plan.units
    assert (net.fc1.out_features, net.fc2.out_features) == tuple(widths.values())
    assert net.norm.num_features == net.norm.running_var.numel() == widths["fc1>fc2"]
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters <= 5 * sum(p.numel() for p in start.parameters())

    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    kinds = [event.kind for event in seen]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert kinds.count("widened") == len(growth.plans)
    assert kinds.count("epoch") == 4
    assert sum(line.get("kind") in kinds for line in lines) == len(kinds)
    assert seen[-1].data["parameters"] == parameters
    assert growth.cost.training_flops > 0
    assert growth.cost.growth_flops > 0

    with torch.no_grad():
        x = clusters(16)[0]
        loaded = esper.load_into(Net(), growth.save(tmp_path / "grown"))
        assert torch.equal(net.eval()(x), loaded.eval()(x))
        assert loss_fn(net, probe[0]) < 0.5 * trained_alone(start, probe)
        assert loss_fn(ema.module.eval(), probe[0]) < 2.0
    with pytest.raises(FinishedError, match=r"step\(\) after finish\(\)"):
        growth.step(batch, loss)


@torch.enable_grad()
def trained_alone(net: nn.Module, probe: list[Any]) -> float:
    """The twin that does not grow: the same net, the same number of steps."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss = loss_fn(net, clusters(48))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return float(loss_fn(net.eval(), probe[0]).detach())


def quiet_run(steps: int, **options: Any) -> tuple[Net, list[Any]]:
    torch.manual_seed(0)
    net, events = Net(), []
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    growth = esper.grow(
        net, optimizer, loss_fn, probe=[clusters(128)], steps=STEPS, on_event=events.append, **options
    )
    train(growth, net, optimizer, partial(clusters, 32), steps, loss_fn)
    growth.finish()
    return net, [
        (e.kind, e.step, e.data) for e in events if e.kind not in {"progress", "run_finished", "widened"}
    ]


def test_the_same_seed_grows_the_same_model_and_another_may_not() -> None:
    (one, told), (two, again), (_, other) = quiet_run(150), quiet_run(150), quiet_run(150, seed=1)
    assert [p.shape for p in one.parameters()] == [p.shape for p in two.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert told == again
    assert told != other


def test_growth_never_moves_the_users_random_streams() -> None:
    """The data a growing run sees are those its twin sees, whatever was raced meanwhile."""
    torch.manual_seed(0)
    net = Net()
    optimizer, probe = torch.optim.Adam(net.parameters(), lr=0.01), [clusters(128)]
    growth = esper.grow(net, optimizer, loss_fn, probe=probe, steps=STEPS)
    for step in range(150):
        batch = clusters(32)
        loss = loss_fn(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        growth.step(batch, loss)
        assert torch.equal(torch.get_rng_state(), before[0]), f"step {step}"
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert growth.plans


def test_a_paused_run_decides_nothing_and_an_asked_for_site_is_raced_next() -> None:
    torch.manual_seed(0)
    net, events = Net(), []
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    growth = esper.grow(
        net,
        optimizer,
        loss_fn,
        probe=[clusters(128)],
        steps=STEPS,
        growth="incubate",
        on_event=events.append,
    )

    def decided(steps: int) -> list[Any]:
        train(growth, net, optimizer, partial(clusters, 32), steps, loss_fn)
        return [e.data for e in events if e.kind == "decision"]

    growth.pause()
    assert decided(60) == []
    growth.resume()
    growth.grow_now("fc2>fc3")
    (decision,) = decided(2)
    assert (decision["site"], decision["reason"].split(";")[0]) == ("fc2>fc3", "asked for")
    with pytest.raises(SiteError, match="no site 'fc2>fc4'; did you mean 'fc2>fc3'"):
        growth.grow_now("fc2>fc4")
    with pytest.raises(LossError, match="the loss is nan at step 62"):
        growth.step(clusters(2), torch.tensor(float("nan")))
    growth.finish()
