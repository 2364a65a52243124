"""A seed that misbehaves, fails or leaves the host worse off is not kept; one that does none of it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.contracts import Stage
from tests.tolaria.governor.test_hooks import Run, loss_fn, same


def turn(module: nn.Module, bad: Any) -> None:
    """Change what a module computes; ``bad`` gets its own forward pass and the input."""
    base: Any = type(module)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return bad(lambda x: base.forward(self, x, *args, **kwargs), x)

    module.__class__ = type(base.__name__, (base,), {"forward": forward})


def outcomes(run: Run) -> list[Any]:
    return [e.data for e in run.events if e.kind == "outcome"]


def test_a_candidate_that_writes_to_the_host_is_undone_before_it_is_exposed() -> None:
    run = Run()
    trial = run.until(Stage.TRAINING)
    run.train()
    weight = run.net[0].weight

    def bad(good: Any, x: Tensor) -> Tensor:
        weight.data.mul_(1.01)
        return good(x)

    turn(trial.race.template, bad)
    while run.alive(trial):
        run.train()
    (told,) = [e.data for e in run.events if e.kind == "rolled_back"]
    undone, plain = run.bits(), Run()
    plain.growth.pause()
    while plain.step < told["to"]:
        plain.train()
    assert same(undone, plain.bits())
    assert "writes to the host" in outcomes(run)[-1]["reason"]
    assert run.growth.run.orchestrator.cooling()


def test_a_hook_that_a_seed_left_is_taken_away_and_the_users_own_stays() -> None:
    run = Run()
    own = run.net[0].register_forward_hook(lambda *rest: None)
    trial = run.until(Stage.GRAFTING)
    seen: list[Any] = []

    def bad(good: Any, x: Tensor) -> Tensor:
        if not seen:
            seen.append(run.net[0].register_forward_hook(lambda *rest: None))
        return good(x)

    turn(trial.kernel, bad)
    run.train()
    assert list(run.net[0]._forward_hooks) == [own.id]
    assert "hooks into the host" in outcomes(run)[-1]["reason"]


def test_one_fault_is_enough_not_to_be_kept() -> None:
    run = Run()
    trial = run.until(Stage.GRAFTING)
    passes: list[int] = []

    def bad(good: Any, x: Tensor) -> Tensor:
        passes.append(1)
        return good(x) * torch.nan if len(passes) == 1 else good(x)

    turn(trial.kernel, bad)
    while run.alive(trial):
        run.train()
    assert not outcomes(run)[-1]["kept"]
    assert "failed 1 times beside the host" in outcomes(run)[-1]["reason"]
    assert not run.growth.plans


def test_what_lowers_the_training_loss_and_raises_the_held_out_one_is_undone() -> None:
    run = Run()
    trial = run.until(Stage.GRAFTING)
    before = run.watch.snapshots.ring[-1]
    probe = next(iter(run.growth.run.orchestrator.services.gate.probe))
    own = [*trial.kernel.parameters()]
    while run.alive(trial):
        with trial.origin.layer.showing(trial.kernel):
            found = torch.autograd.grad(loss_fn(run.net, probe), own)
        with torch.no_grad():  # a parasite that the training loss does not show, for the sake of a short test
            for parameter, gradient in zip(own, found, strict=True):
                parameter.add_(0.5 * gradient)
        losses = run.growth.run.orchestrator.oldest.losses
        losses[:] = [0.0] * len(losses)
        run.train()
    assert "harm: the held-out loss is" in outcomes(run)[-1]["reason"]
    assert all(torch.equal(t, before.tensors[name].copy) for name, t in run.watch.snapshots.tensors())


def test_an_examination_goes_on_from_its_state() -> None:
    run, other = Run(), Run()
    run.until(Stage.STABILISING)
    state = copy.deepcopy(run.watch.state_dict())
    assert state["examiner"]["before"]
    other.watch.load_state_dict(state)
    assert other.watch.state_dict() == state


@pytest.mark.parametrize("seed", range(3))
def test_an_honest_seed_is_kept(seed: int) -> None:
    run = Run(seed)
    while not run.growth.plans:
        run.train()
    assert [e.kind for e in run.events if e.kind == "rolled_back"] == []
