"""Every optimizer of torch with every scheduler: train, widen, graft, cull and resume, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esper.blueprints import CATALOGUE
from esper.blueprints.kernel import GraphKernel
from esper.blueprints.program import Program
from esper.contracts import Signature, WidenPlan
from esper.kasmina.race.own_optimizers import OwnOptimizers
from esper.surgery.branches import attach
from esper.surgery.optimizers.adoption import adopt
from esper.surgery.optimizers.averages import copy_of, widen_average
from esper.surgery.optimizers.kinds import KINDS, kind_of
from esper.surgery.optimizers.widening import widen_state
from esper.surgery.widen_layers import empty_slices, widen
from tests.surgery.zoo import (
    OPTIMIZERS,
    SCHEDULERS,
    VARIANTS,
    batch,
    known_optimizers,
    known_schedulers,
    loss_of,
    settings,
)

SLICES = Callable[[nn.Module, WidenPlan], dict[str, Tensor]]
ENDS = {"wide": ("fc1", "fc2", 4), "narrow": ("head", "head", 5)}  # where a branch goes, and what it reads


@cache
def program(size: int, hidden: int) -> Program:
    graph = CATALOGUE.get("residual_mlp" if size == 4 else "low_rank")
    return graph.lower(Signature("vector", "parallel", size, 5), hidden)


class Training:
    """What a user's loop holds: everything here outlives growth."""

    def __init__(self, model: nn.Module, optimizer: str, scheduler: str) -> None:
        self.model = model
        self.optimizers = {**OPTIMIZERS, **VARIANTS}[optimizer](model)
        first = next(iter(self.optimizers.values()))
        self.kind = type(first).__name__
        self.scheduler = SCHEDULERS[scheduler](first)
        self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.time = 0

    def step(self) -> None:
        """Two micro-batches, clipping, one step of everything."""
        time = 0 if self.kind == "LBFGS" else self.time  # it is made for one batch that holds everything
        batches = [batch(2 * time), batch(2 * time + 1)]
        self.time += 1

        def closure() -> Tensor:
            self.model.zero_grad()
            losses = [loss_of(self.model, one) / 2 for one in batches]
            for loss in losses:
                loss.backward()
            clipped = (p for p in self.model.parameters() if p.grad is None or not p.grad.is_sparse)
            nn.utils.clip_grad_norm_(clipped, 1.0)
            return torch.stack(losses).sum()

        if self.kind != "LBFGS":
            closure()
        for one in self.optimizers.values():
            one.step(closure) if self.kind == "LBFGS" else one.step()
        self.tick()
        self.ema.update_parameters(self.model)

    def idle(self) -> None:
        """One step without gradients: of no effect but on learning rates and momenta."""
        for one in self.optimizers.values():
            one.step(lambda: torch.zeros(()))
        self.tick()

    def tick(self) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(1.0)
        else:
            self.scheduler.step()

    def widen(self, plan: WidenPlan, slices: Mapping[str, Tensor]) -> list[str]:
        widened = widen(self.model, plan, slices)
        widen_average(self.ema, plan, slices)
        assert widened.replaced == ()
        return widen_state(self.optimizers, widened.changes)

    def graft(self, where: str, hidden: int = 3) -> tuple[GraphKernel, Callable[[], None]]:
        """Let a branch stay; returns it and the way back."""
        entry, exit_, size = ENDS[where]
        kernel = GraphKernel(program(size, hidden), next(self.model.parameters()))
        for parameter in kernel.parameters():  # what goes out starts at zero, which would teach nothing
            nn.init.normal_(parameter, std=0.1)
        ends = [self.model.get_submodule(end) for end in (entry, exit_)]
        twin = copy_of(self.ema, {entry, exit_})
        pairs = [(ends, kernel)]
        pairs.append(([twin.get_submodule(end) for end in (entry, exit_)], copy.deepcopy(kernel)))
        undone = [attach(where, one, (first, last), "parallel") for (first, last), one in pairs]
        undo = adopt(self.optimizers, ends, kernel, None, f"grown.{where}.")

        def back() -> None:
            undo()
            for take_out in undone:
                take_out()

        return kernel, back

    def state(self) -> list[Any]:
        dicts = [one.state_dict() for one in self.optimizers.values()]
        return [*dicts, self.model.state_dict(), self.ema.state_dict(), self.scheduler.state_dict()]

    def load(self, state: list[Any]) -> None:
        *dicts, model, ema, scheduler = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.ema.load_state_dict(ema)
        self.scheduler.load_state_dict(scheduler)
        for one, saved in zip(self.optimizers.values(), dicts, strict=True):
            one.load_state_dict(saved)


def same(a: Any, b: Any) -> bool:
    """Compare nested states bit for bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return callable(a) or hasattr(a, "__dict__") or bool(a == b)


def test_every_optimizer_and_scheduler_torch_has_is_here() -> None:
    assert set(OPTIMIZERS) == known_optimizers() == set(KINDS)
    assert set(SCHEDULERS) == known_schedulers()


CELLS = [(o, s) for o in OPTIMIZERS for s in SCHEDULERS] + [(v, "CosineAnnealingLR") for v in VARIANTS]


@pytest.mark.parametrize(("optimizer", "scheduler"), CELLS)
def test_a_run_goes_on_through_all_that_grows(
    host: nn.Module,
    new_host: Callable[[], nn.Module],
    plan_of: Callable,
    slices_of: SLICES,
    optimizer: str,
    scheduler: str,
) -> None:
    torch.manual_seed(0)
    host.load_state_dict(new_host().state_dict())
    grown = Training(host, optimizer, scheduler)
    twin = Training(copy_without_words(host), optimizer, scheduler)  # never grows; its rates must be the same
    held = list(host.parameters())

    def train(steps: int = 2) -> None:
        for _ in range(steps):
            grown.step()
            twin.idle()
            assert settings(grown.optimizers) == settings(twin.optimizers)

    train()
    grow_and_check(grown, plan_of(3, 5), slices_of)
    train()
    kernel, _ = grown.graft("wide")
    born = [p.clone() for p in kernel.parameters()]
    train()
    assert not any(torch.equal(p, old) for p, old in zip(kernel.parameters(), born, strict=True))
    grow_and_check(grown, plan_of(5, 6), slices_of)
    train()

    before = copy.deepcopy(grown.state())
    kernel, cull = grown.graft("narrow")
    place: Any = SimpleNamespace(ends=lambda: (host.head, host.head))
    own = OwnOptimizers(grown.optimizers, lambda what, why: None).like(kernel, place)
    kernel(torch.randn(8, 5)).square().mean().backward()
    own.step()
    cull()
    assert same(grown.state(), before)

    torch.manual_seed(1)
    resumed = Training(new_host(), optimizer, scheduler)
    for plan in (plan_of(3, 5), None, plan_of(5, 6)):
        if plan is None:
            resumed.graft("wide")
        else:
            resumed.widen(plan, empty_slices(resumed.model, plan))
    resumed.load(grown.state())
    resumed.time = grown.time
    for _ in range(2):
        grown.step()
        resumed.step()
    assert same(resumed.state(), grown.state())
    assert all(p.isfinite().all() for p in host.parameters())
    assert all(any(p is q for q in host.parameters()) for p in held)


def copy_without_words(host: nn.Module) -> nn.Module:
    twin = copy.deepcopy(host)
    twin._modules.pop("words", None)  # the twin gets its own
    return twin


def grow_and_check(training: Training, plan: WidenPlan, slices_of: SLICES) -> None:
    """Widen; what was there stays bit for bit, what is new follows the stated rule."""
    named = dict(training.model.named_parameters())
    before = [
        {name: copy.deepcopy(one.state[p]) for name, p in named.items() if p in one.state}
        for one in training.optimizers.values()
    ]
    slices = slices_of(training.model, plan)
    lines = training.widen(plan, slices)
    edits = {edit.name: edit for edit in plan.edits}
    assert bool(lines) == (training.kind == "LBFGS")
    for one, states in zip(training.optimizers.values(), before, strict=True):
        kind = kind_of(one)
        if kind.history:
            (left,) = one.state.values()
            (had,) = states.values()
            assert left == {"func_evals": had["func_evals"], "n_iter": 0}
            continue
        for name, state in states.items():
            assert set(one.state[named[name]]) == set(state)
            for key, old in state.items():
                new, edit = one.state[named[name]][key], edits.get(name)
                if edit is None or not isinstance(old, Tensor) or not old.dim():
                    assert same(new, old)
                    continue
                if key in kind.reduced and kind.reduced[key] % named[name].dim() == edit.axis:
                    assert torch.equal(new, old)  # a mean over the grown axis
                    continue
                kept, fresh = new.split([edit.old, edit.new - edit.old], edit.axis)
                assert torch.equal(kept, old)
                setting = 0.1 if key == "sum" else 0.0  # Adagrad is given it
                expected = slices[name] if key == kind.average else torch.full_like(fresh, setting)
                expected = old.mean(edit.axis, keepdim=True).expand_as(fresh) if kind.padded else expected
                if key != "step_size":  # the rate, which the scheduler has moved
                    assert torch.equal(fresh, expected)
                else:
                    group = next(g for g in one.param_groups if any(p is named[name] for p in g["params"]))
                    assert torch.equal(fresh, torch.full_like(fresh, group["lr"]))
