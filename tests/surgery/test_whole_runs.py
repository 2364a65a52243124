"""Optimizers with rules of their own, in whole runs: what grows trains on, is told, and goes on elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Adafactor, AdamW, Muon, Optimizer, SparseAdam

import esper
from esper.contracts import Event
from esper.errors import OptimizerError

STEPS, CLASSES = 100, 8


class Words(nn.Module):
    """Looks words up; one unit for eight classes is far too narrow."""

    def __init__(self, sparse: bool, bias: bool = True) -> None:
        super().__init__()
        self.words = nn.Embedding(CLASSES, CLASSES, sparse=sparse)
        self.fc1, self.fc2 = nn.Linear(CLASSES, 1, bias=bias), nn.Linear(1, CLASSES, bias=bias)
        with torch.no_grad():
            self.words.weight.copy_(2 * torch.eye(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(self.words(x[:, 0]) + 0.01 * x[:, 1:])))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (96, 1), generator=generator)
    noise = torch.randint(9, (96, CLASSES), generator=generator)
    return torch.cat([label, noise], 1), label[:, 0]


def loss_fn(model: nn.Module, given: Any) -> Tensor:
    return nn.functional.cross_entropy(model(given[0]), given[1])


def sorted_out(net: Words) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    own = [*net.fc1.parameters(), *net.fc2.parameters()]
    return [p for p in own if p.dim() == 2], [p for p in own if p.dim() == 1]


def muon(net: Words) -> dict[str, Optimizer]:
    matrices, vectors = sorted_out(net)
    return {"muon": Muon(matrices, lr=0.05), "adam": AdamW([*vectors, net.words.weight], lr=0.02)}


def sparse(net: Words) -> dict[str, Optimizer]:
    rest = [p for group in sorted_out(net) for p in group]
    return {"rest": AdamW(rest, lr=0.02), "words": SparseAdam(net.words.parameters(), lr=0.001)}


MAKERS: dict[str, Callable[[Words], dict[str, Optimizer]]] = {
    "Adafactor": lambda net: {"main": Adafactor(net.parameters(), lr=0.05)},
    "LBFGS": lambda net: {"main": LBFGS(net.parameters(), lr=0.3, max_iter=2)},
    "Muon": muon,
    "SparseAdam": sparse,
}


class Run:
    """A loop with its own way to step."""

    def __init__(self, name: str, blueprints: str) -> None:
        torch.manual_seed(0)
        self.net, self.events, self.name = Words(name == "SparseAdam"), list[Event](), name
        self.optimizers = MAKERS[name](self.net)
        self.growth = esper.grow(
            self.net,
            self.optimizers,
            loss_fn,
            probe=[batch(1000), batch(1001)],
            steps=STEPS,
            budget={"growth_factor": 8.0, "growth_events": 2},
            config={"blueprints": [blueprints], "gate": {"false_keep": 0.5}},
            on_event=self.events.append,
        )

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            given = batch(0 if self.name == "LBFGS" else step)

            def closure(given: Any = given) -> Tensor:
                self.net.zero_grad()
                loss = loss_fn(self.net, given)
                loss.backward()
                return loss

            if self.name == "LBFGS":
                loss = self.optimizers["main"].step(closure)
            else:
                loss = closure()
                for one in self.optimizers.values():
                    one.step()
            self.growth.step(given, loss)

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]


@pytest.mark.parametrize("blueprints", ["widen", "residual_mlp"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_run_grows_trains_on_and_is_resumed(name: str, blueprints: str) -> None:
    run, half = Run(name, blueprints), 55
    run.train(0, half)
    state = copy.deepcopy(
        (run.growth.state_dict(), run.net.state_dict(), [o.state_dict() for o in run.optimizers.values()])
    )
    run.train(half, STEPS)
    run.growth.finish()
    kept = run.told("widened" if blueprints == "widen" else "grafted")
    assert kept, [event.data for event in run.told("gate")]
    owned = {id(p) for o in run.optimizers.values() for g in o.param_groups for p in g["params"]}
    assert owned == {id(p) for p in run.net.parameters()}
    lost = [e for e in run.told("fallback") if e.data["what"] == "optimizer state"]
    assert len(lost) == (len(kept) if name == "LBFGS" else 0)
    evaluations = STEPS * (2 if name == "LBFGS" else 1)
    assert run.growth.cost.training_flops >= 3 * 96 * evaluations * 2 * 2 * CLASSES  # of the narrow net
    if name == "Muon":
        assert all(p.dim() == 2 for p in run.optimizers["muon"].param_groups[0]["params"])

    again = Run(name, blueprints)
    again.growth.load_state_dict(state[0])
    again.net.load_state_dict(state[1])
    for one, saved in zip(again.optimizers.values(), state[2], strict=True):
        one.load_state_dict(saved)
    again.train(half, STEPS)
    again.growth.finish()
    mine, theirs = run.net.state_dict(), again.net.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_muon_alone_may_widen_but_is_refused_branches_with_vectors() -> None:
    net = Words(False, bias=False)
    optimizer = Muon(net.parameters())
    with pytest.raises(
        OptimizerError, match=r"no optimizer takes '\w*bias' .* set blueprints to \['widen'\]"
    ):
        esper.grow(net, optimizer, loss_fn, probe=[batch(0)], config={"blueprints": ["residual_mlp"]})
    esper.grow(net, optimizer, loss_fn, probe=[batch(0)], config={"blueprints": ["widen"]}).finish()
