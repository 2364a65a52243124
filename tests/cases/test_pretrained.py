"""Models built from a config, in the manner of Hugging Face: from_pretrained loads what grew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esper
from esper.contracts import DeepenPlan, Event
from esper.kasmina.depth.stack import Stack
from esper.kasmina.evidence.score import Scored
from esper.kasmina.morphable import MorphableModel
from esper.saving.ruled import ties
from esper.tolaria.growth.early.verdicts import as_one
from esper.tolaria.growth.evidence.evidence import Found
from esper.tolaria.growth.run.account import Looked
from tests.cases.pretrained_hosts import Config, Tiny, loss_fn, sums

STEPS = 200
MLPS = frozenset(f"layers.{i}.mlp.gate*layers.{i}.mlp.up>layers.{i}.mlp.down" for i in range(2))
HEADS = frozenset(f"layers.{i}.attention.q>layers.{i}.attention.out" for i in range(2))


class Run:
    """A run that is over."""

    def __init__(self, net: nn.Module, sites: str = "auto", blueprint: str = "auto", **given: Any) -> None:
        self.net, self.events = net, list[Event]()
        optimizer = torch.optim.Adam(net.parameters(), 0.005)
        config = {"blueprints": [blueprint], "early": {"false_keep": 0.4}, **given.pop("config", {})}
        self.growth = esper.grow(
            net, optimizer, loss_fn, probe=[sums(256)], steps=STEPS, sites=sites, config=config,
            budget={"growth_factor": 4.0}, on_event=self.events.append, **given,
        )  # fmt: skip
        for _ in range(STEPS):
            batch = sums(64)
            loss = loss_fn(net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            self.growth.step(batch, loss)
        self.growth.finish()

    @property
    def warnings(self) -> list[str]:
        return [event.data["message"] for event in self.events if event.kind == "warning"]


def tiny(**given: Any) -> Tiny:
    torch.manual_seed(0)
    return Tiny(Config(**given))


class Holder(nn.Module):
    """A user's model around a pretrained one."""

    def __init__(self) -> None:
        super().__init__()
        self.core = tiny()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.core(ids)


RUNS = [
    ("auto", "auto", {}, ("num_layers", "intermediate_size", "num_heads")),
    ("*mlp*", "widen", {}, ("intermediate_size",)),
    ("*mlp*", "widen", {"n_inner": 2, "intermediate_size": 5}, ("n_inner",)),
    ("*mlp*", "widen", {"hidden_size": 12, "intermediate_size": 3, "num_heads": 3}, ("intermediate_size",)),
    ("*attention*", "widen", {}, ("num_heads",)),
]


@pytest.mark.parametrize(("sites", "blueprint", "config", "numbers"), RUNS)
def test_what_grew_early_is_saved_and_loaded_as_such_models_are(
    sites: str, blueprint: str, config: Any, numbers: tuple[str, ...], tmp_path: Path
) -> None:
    net, before = tiny(**config), Config(**config)
    run = Run(net, sites, blueprint)
    assert run.growth.plans
    assert run.warnings == []
    changed = {name for name, value in vars(net.config).items() if value != getattr(before, name)}
    assert changed == set(numbers)
    net.save_pretrained(tmp_path / "saved")
    loaded = Tiny.from_pretrained(tmp_path / "saved").eval()
    x = sums(8)[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), net.eval()(x))
    for event in run.growth.report().events:
        grown = {one.site: one.grown for one in event.looked}
        for group in (MLPS, HEADS):
            assert len({grown.get(name, 0) for name in group}) == 1


def test_one_inside_a_users_model_follows_too() -> None:
    holder = Holder()
    run = Run(holder, "*mlp*", "widen")
    assert run.growth.plans
    assert run.warnings == []
    assert holder.core.config.intermediate_size == holder.core.layers[0].get_submodule("mlp.up").out_features


def test_what_grew_at_one_of_several_places_is_told_and_kept_otherwise(tmp_path: Path) -> None:
    run = Run(tiny(), "*0.mlp*", "widen")
    assert run.growth.plans
    (warning,) = [one for one in run.warnings if "cannot say how it grew" in one]
    assert "growth.save(folder)" in warning
    run.growth.save(tmp_path / "saved")
    x = sums(8)[0]
    with torch.no_grad():
        assert torch.equal(esper.load_into(tiny(), tmp_path / "saved").eval()(x), run.net.eval()(x))


class Graded(Tiny):
    """Its blocks differ by where they stand."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.norm2.eps = float(index) + 1e-5


def test_a_block_that_is_not_as_its_place_would_have_it_is_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, events = Graded(Config()), list[Event]()
    growth = esper.grow(
        net, torch.optim.Adam(net.parameters()), loss_fn, probe=[sums(64)], steps=STEPS, growth="early",
        on_event=events.append,
    )  # fmt: skip
    stack = growth.run.morphable.places["layers+block"]
    assert isinstance(stack, Stack)
    assert growth.run.parts.committer.deepen(stack, stack.block(0), 0) == ""
    for parameter in net.layers[-1].parameters():
        torch.nn.init.normal_(parameter)  # it has learned
    growth.finish()
    assert net.config.num_layers == len(net.layers) == 3
    (said,) = [e.data["message"] for e in events if e.kind == "warning" and "from_pre" in e.data["message"]]
    assert "no number of it gives a Graded that computes the same" in said
    net.save_pretrained(tmp_path / "saved")
    x, loaded = sums(8)[0], Graded.from_pretrained(tmp_path / "saved").eval()
    assert not torch.equal(loaded(x), net.eval()(x))
    growth.save(tmp_path / "grown")
    grown = esper.load_into(Graded(Config()), tmp_path / "grown").eval()
    assert torch.equal(grown(x), net(x))


def test_what_a_number_rules_is_found_as_long_as_a_config_says_the_model() -> None:
    net = tiny()
    places = MorphableModel(net, lambda m: loss_fn(m, sums(16)), 16).places
    assert set(ties(net, places)) == {MLPS, HEADS}
    assert set(ties(net, {name: places[name] for name in MLPS})) == {MLPS}
    assert ties(net, {name: places[name] for name in HEADS if "0" in name}) == ()
    net.config.intermediate_size = 7
    assert set(ties(net, places)) == {MLPS, HEADS}, "it is found out what would say it"
    net.layers[0].mlp = nn.Identity()  # type: ignore[assignment]
    assert ties(net, {name: places[name] for name in HEADS}) == ()
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4))
    found = MorphableModel(plain, lambda m: m(torch.randn(4, 4)).sum(), 4).places
    assert len(found) == 2
    assert ties(plain, found) == ()


def test_a_block_that_comes_is_as_wide_as_its_like() -> None:
    run = Run(tiny())
    assert any(isinstance(plan, DeepenPlan) for plan in run.growth.plans)
    sizes = {tuple(one.shape) for name, one in run.net.named_parameters() if name.endswith("up.weight")}
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("gains", "passes"),
    [((0.16, 0.16), True), ((0.3, 0.02), True), ((0.3, -0.3), False), ((0.0, 0.05), False)],
)
def test_a_group_is_judged_by_its_sum(gains: tuple[float, float], passes: bool) -> None:
    draws = np.random.default_rng(0)
    noise = [(one - one.mean()) / one.std() for one in draws.normal(size=(2, 256))]
    nothing: Any = None  # neither the kernels nor the reports are read
    scored = {
        name: Scored(nothing, nothing, {}, values=gain + one)
        for name, gain, one in zip("ab", gains, noise, strict=True)
    }
    found = Found(scored, 1.0, 256, True, 0, {})
    members: list[Looked] = []
    for name, one in scored.items():
        value = found.p_value(one.values)
        assert value is not None
        members.append(Looked(name, 4, 4, value, 0.004, reason="" if value <= 0.004 else "it may be chance"))
    assert any(one.reason for one in members)
    as_one(found, members, 0.004)
    assert [not one.reason for one in members] == [passes, passes]
    assert all((one.together is not None) == passes for one in members)


class Sealed(Config):
    """A config that nobody may change."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.__dict__["sealed"] = True

    def __setattr__(self, name: str, value: object) -> None:
        if self.__dict__.get("sealed"):
            raise AttributeError(f"{name} is sealed")
        super().__setattr__(name, value)


@pytest.mark.parametrize("blueprint", ["auto", "widen"])
def test_a_config_that_cannot_be_changed_stops_no_growth_and_it_is_told(blueprint: str) -> None:
    torch.manual_seed(0)
    net = Tiny(Sealed())
    before = dict(vars(net.config))
    run = Run(net, blueprint=blueprint)
    assert run.growth.plans
    assert vars(net.config) == before
    assert [one for one in run.warnings if "cannot say how it grew" in one and "no number of it" in one]
