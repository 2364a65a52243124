"""A budget counts, or multiplies; what it allows is held to, and told before the run and in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.contracts import Event
from esper.errors import ConfigError
from esper.tolaria.trainer import Trainer

STEPS = 120
Batch = tuple[Tensor, Tensor]


def clusters(seed: int, examples: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(8, (examples,), generator=generator)
    return 2 * torch.eye(8)[label] + 0.3 * torch.randn(examples, 8, generator=generator), label


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 8))


HOST = sum(p.numel() for p in make_net().parameters())  # 42
FLOPS = 2 * (8 * 2 + 2 * 8)


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def trained(growth: str = "early", **options: Any) -> tuple[nn.Module, list[Event], esper.Growth]:
    net, events = make_net(), list[Event]()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    growing = esper.grow(
        net,
        optimizer,
        loss_fn,
        probe=[clusters(10_000, 256)],
        steps=STEPS,
        growth=growth,  # type: ignore[arg-type]
        on_event=events.append,
        **options,
    )
    for step in range(STEPS):
        batch = clusters(step)
        loss = loss_fn(net, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growing.step(batch, loss)
    return growing.finish(), events, growing


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("growth", ["early", "incubate"])
@pytest.mark.parametrize(
    ("budget", "most"),
    [
        ({"parameters": 100}, 100),
        ({"growth_factor": 2.0}, 2 * HOST),
        ({"parameters": 100, "growth_factor": 16.0}, 100),  # the count holds
        ({"parameters": 1e2}, 100),  # a whole number, however it is written
    ],
    ids=str,
)
def test_a_model_grows_up_to_its_budget_and_not_beyond(
    growth: str, budget: dict[str, Any], most: int
) -> None:
    net, events, _ = trained(growth, budget=budget)
    assert HOST < size(net) <= most
    assert events[0].data["limits"] == {"parameters": most, "flops": None, "latency_ms": None}
    assert events[0].data["growth"] == growth


@pytest.mark.parametrize("growth", ["early", "incubate"])
@pytest.mark.parametrize("budget", [{"model_flops": 3 * FLOPS}, {"flops_factor": 3.0}], ids=str)
def test_flops_are_held_to(growth: str, budget: dict[str, Any]) -> None:
    _, events, growing = trained(growth, budget=budget)
    assert events[0].data["limits"]["flops"] == 3 * FLOPS
    assert FLOPS < growing.run.morphable.flops <= 3 * FLOPS


def test_the_default_is_sixteen_times_the_host() -> None:
    net, events, _ = trained()
    assert events[0].data["limits"]["parameters"] == 16 * HOST
    assert HOST < size(net) <= 16 * HOST


def test_a_plan_tells_the_limits_the_recipe_and_its_events() -> None:
    budget = {"parameters": 200, "flops_factor": 2.0, "latency_ms": 5.0}
    made = esper.plan(make_net(), torch.zeros(1, 8), steps=100, budget=budget)
    assert made.growth == "early"
    assert made.decisions == [2, 6, 11, 19, 30, 45]
    assert made.limits == {"parameters": 200, "flops": 2 * FLOPS, "latency_ms": 5.0}
    assert made.room == {"0>2": 2}  # by its FLOPs; its parameters would allow nine
    assert "at most 200 parameters, 128 FLOPs, 5 ms" in str(made)
    assert made.to_dict()["limits"]["flops"] == 2 * FLOPS
    two = {"growth_events": 2}
    raced = esper.plan(make_net(), torch.zeros(1, 8), steps=100, budget=two, growth="incubate")
    assert raced.growth == "incubate"
    assert raced.decisions == [10, 50]
    off = esper.plan(make_net(), torch.zeros(1, 8), steps=100, growth="off")
    assert off.decisions == []
    assert "growth is off" in str(off)
    with pytest.raises(ConfigError, match="use growth_factor="):
        esper.plan(make_net(), torch.zeros(1, 8), budget={"parameters": 4})


def test_growth_overrides_the_settings() -> None:
    net, events, growing = trained("off", config={"growth": "early"})
    assert growing.run.recipe == "off"
    assert size(net) == HOST
    assert {event.kind for event in events} == {"run_started", "progress", "run_finished"}
    _, events, growing = trained("incubate", config={"growth": "off"})
    assert growing.run.recipe == "incubate"
    assert any(event.kind == "race" for event in events)


def test_a_trainer_takes_it_too() -> None:
    net = make_net()
    given = {"train": [clusters(0)], "probe": [clusters(1)], "epochs": 1}
    optimizer = torch.optim.Adam(net.parameters())
    assert Trainer(net, optimizer, loss_fn, **given, growth="off").growth.run.recipe == "off"


def test_an_unknown_recipe_is_refused_at_the_door() -> None:
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(ConfigError, match="unknown growth 'erly'; did you mean 'early'"):
        esper.grow(net, optimizer, loss_fn, probe=[clusters(0)], growth="erly")  # type: ignore[arg-type]


class Narrow(nn.Module):
    """A residual block that is narrow inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).relu())
        return y


@pytest.mark.parametrize("most", [500, 900])
def test_a_block_costs_what_it_is_when_it_comes(most: int) -> None:
    """Inner widths grow first; a copy of a widened block is dearer than the one the run began with."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Narrow()), nn.Linear(8, 8))
    optimizer, data = torch.optim.Adam(net.parameters(), lr=0.02), torch.Generator().manual_seed(1)
    first, second = (torch.randn(8, 8, generator=data) for _ in range(2))

    def batch(examples: int = 64) -> Batch:
        x = torch.randn(examples, 8, generator=data)
        return x, (x @ first).sin() @ second

    def squared(model: nn.Module, given: Batch) -> Tensor:
        return nn.functional.mse_loss(model(given[0]), given[1])

    growing = esper.grow(net, optimizer, squared, probe=[batch(512)], steps=300, budget={"parameters": most})
    for _ in range(300):
        given = batch()
        optimizer.zero_grad()
        loss = squared(net, given)
        loss.backward()
        optimizer.step()
        growing.step(given, loss)
    growing.finish()
    assert len(net[1]) > 1
    assert net[1][0].up.out_features > 2
    assert sum(parameter.numel() for parameter in net.parameters()) <= most


@pytest.mark.parametrize("budget", [400, [401], "402"])
def test_a_budget_that_is_no_mapping_says_what_to_give(budget: Any) -> None:
    with pytest.raises(ConfigError, match="give a mapping"):
        trained(budget=budget)
