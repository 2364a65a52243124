"""Whatever grew: what finish() leaves is plain torch, and does all that a model of torch's does."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.contracts import DeepenPlan, WidenPlan
from esper.saving.genome import GraftPlan
from tests.cases.plain_alone import WAYS
from tests.cases.plain_hosts import KINDS

STEPS = 150
CONFIG: dict[str, Any] = {
    "schedule": {"warmup": 0.05}, "race": {"steps": 12, "candidates": 2},
    "gate": {"false_keep": 0.99, "min_gain": 0.0}, "early": {"false_keep": 0.9, "shares": [0.1, 0.2, 0.3]},
}  # fmt: skip
ALONE = """
import sys
sys.modules['esper'] = None
from tests.cases.plain_alone import tell
tell(sys.argv[1])
"""
PLANS = {"residual_mlp": GraftPlan, "deepen": DeepenPlan, "widen": WidenPlan}


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Grown:
    """A run that grew one kind, and is over."""

    def __init__(self, name: str) -> None:
        kind = KINDS[name]
        torch.manual_seed(0)
        self.net = kind.build()
        self.plain = copy.deepcopy(self.net)
        self.optimizer = torch.optim.Adam(self.net.parameters(), 0.01)
        branch = kind.blueprint not in ("widen", "deepen")
        budget = {"growth_events": 1, "growth_factor": 200} if branch else {"growth_factor": 8.0}
        growth = esper.grow(
            self.net, self.optimizer, loss_fn, probe=[kind.draw(256)], steps=STEPS, sites=kind.site,
            growth=kind.recipe, budget=budget, config={**CONFIG, "blueprints": [kind.blueprint]},
        )  # fmt: skip
        for _ in range(STEPS):
            batch = kind.draw(32)
            loss = loss_fn(self.net, batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            growth.step(batch, loss)
        assert growth.finish() is self.net
        assert {type(plan) for plan in growth.plans} == {PLANS[kind.blueprint]}, str(growth)
        self.net.eval()
        self.x = kind.draw(8)[0]


@cache
def grown(name: str) -> Grown:
    return Grown(name)


def reachable(*roots: Any) -> Iterator[Any]:
    """List all that hangs on objects: attributes, hooks, closures, bound methods; not what modules import.

    Classes are listed and not looked into: they know their subclasses.
    """
    seen = {id(one) for one in roots}
    left = list(roots)
    while left:
        one = left.pop()
        yield one
        for further in [] if isinstance(one, type) else gc.get_referents(one):
            imported = isinstance(further, ModuleType) or (
                isinstance(further, dict) and "__name__" in further
            )
            if id(further) not in seen and not imported:
                seen.add(id(further))
                left.append(further)


def home(thing: Any) -> str:
    """Return the module that a class or function is from, or that the class of an object is."""
    own = getattr(thing, "__module__", None) if isinstance(thing, type) or callable(thing) else None
    return own if isinstance(own, str) else type(thing).__module__


SPOILS: dict[str, Callable[[nn.Linear], object]] = {
    "closure of a hook": lambda net: net.register_forward_hook(lambda m, x, y, own=WidenPlan: None),
    "hook of a tensor": lambda net: net.weight.register_hook(esper.wrap),
    "attribute of a tensor": lambda net: setattr(net.bias, "own", esper.EsperError()),
    "override": lambda net: setattr(net, "forward", partial(esper.wrap, net)),
}


def of_esper(*roots: Any) -> list[Any]:
    return [one for one in reachable(*roots) if home(one).partition(".")[0] == "esper"]


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_the_audit_finds(spoil: Callable[[nn.Linear], object]) -> None:
    net = nn.Linear(2, 2)
    assert of_esper(net) == []
    spoil(net)
    assert of_esper(net) != []


@pytest.mark.parametrize("name", KINDS)
def test_nothing_of_esper_hangs_on_model_or_optimizer(name: str) -> None:
    run = grown(name)
    assert of_esper(run.net, run.optimizer) == []


@pytest.mark.parametrize("name", KINDS)
def test_every_layer_is_what_it_was_but_for_the_hook_of_a_branch(name: str) -> None:
    run = grown(name)
    now = dict(run.net.named_modules())
    for path, module in run.plain.named_modules():
        assert type(now[path]) is type(module)
        own = {key for key, value in vars(now[path]).items() if key not in vars(module)}
        assert own <= ({"forward", "__prepare_scriptable__"} if name == "branch" else set())
        for key, value in vars(module).items():
            if key.endswith("_hooks") and not (name == "branch" and "forward" in key):
                assert vars(now[path])[key] == value, (path, key)
        assert not torch.nn.utils.parametrize.is_parametrized(now[path])
    names = run.net.state_dict()
    assert [key for key in names if key in run.plain.state_dict()] == list(run.plain.state_dict())
    if KINDS[name].blueprint == "widen":
        assert list(now) == [path for path, _ in run.plain.named_modules()]
        assert list(names) == list(run.plain.state_dict())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Every kind in a process without Esper."""
    folder = tmp_path_factory.mktemp("plain")
    for name in KINDS:
        run = grown(name)
        torch.save((run.x, run.net(run.x).detach(), run.net), folder / f"{name}.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", KINDS)
def test_it_does_what_a_plain_model_does_where_esper_is_not(
    name: str, way: str, alone: dict[str, dict[str, str]]
) -> None:
    assert alone[name][way] == ""
