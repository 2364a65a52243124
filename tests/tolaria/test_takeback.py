"""An event that is taken back leaves the run as it was before it, to the bit, and the loop goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.contracts import Event

STEPS, CLASSES = 240, 8


def clusters(seed: int, examples: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (examples,), generator=generator)
    return 2 * torch.eye(CLASSES)[label] + 0.3 * torch.randn(examples, CLASSES, generator=generator), label


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 8))


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 6)
        self.blocks = nn.ModuleList([Block()])
        self.head = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Forked(nn.Module):
    """Two layers read one, one of them through a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.norm = nn.Linear(8, 2), nn.BatchNorm1d(2)
        self.one, self.two = nn.Linear(2, 8), nn.Linear(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.trunk(x))
        return self.one(torch.relu(h)) + self.two(h)


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "widths": mlp,
    "BatchNorm": normed,
    "depth": Deep,
    "fork": Forked,
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: Adam(p, 0.01),
    "AMSGrad": lambda p: Adam(p, 0.01, amsgrad=True),
    "SGD with momentum": lambda p: SGD(p, 0.1, momentum=0.9, nesterov=True),
    "AdamW": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "LBFGS": lambda p: LBFGS(p, 0.5, max_iter=4, history_size=4),
}


class Run:
    """A run with an average of its weights and a schedule."""

    def __init__(self, host: str, optimizer: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.net = HOSTS[host]()
        self.optimizer = OPTIMIZERS[optimizer](self.net.parameters())
        self.scheduler = CosineAnnealingLR(self.optimizer, STEPS)
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        self.events: list[Event] = []
        self.now = 0
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            probe=[clusters(10_000, 512)],
            steps=STEPS,
            schedulers=[self.scheduler],
            ema=[self.average],
            growth="early",
            on_event=self.events.append,
            **{"config": {"early": {"enough": 0.0, "reopen": "no"}}, **options},
        )

    def train(self) -> tuple[Any, Tensor]:
        """Do what a user does in one step, but for the line that grows."""
        batch = clusters(self.now)
        self.now += 1
        kept: list[Tensor] = []

        def closure() -> float:
            self.optimizer.zero_grad()
            loss = loss_fn(self.net, batch)
            loss.backward()
            kept.append(loss)
            return float(loss.detach())

        self.optimizer.step(closure)
        self.scheduler.step()
        self.average.update_parameters(self.net)
        return batch, kept[0]

    def step(self) -> None:
        self.growth.step(*self.train())

    def facts(self) -> dict[str, Any]:
        """Return everything that an event may change, by name."""
        names = {id(p): n for n, p in self.net.named_parameters()}
        found: dict[str, Any] = {}
        for title, model in (("host", self.net), ("average", self.average)):
            found |= {f"{title} {n}": t.detach().clone() for n, t in model.state_dict().items()}
            for path, module in model.named_modules():
                found |= {
                    f"{title} {path}.{k}": v
                    for k, v in module.__dict__.items()
                    if isinstance(v, int | float | str) and not k.startswith("_")
                }
        for parameter, state in self.optimizer.state.items():
            found[f"state {names[id(parameter)]}"] = copy.deepcopy(state)
        return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def until_grown(run: Run) -> dict[str, Any]:
    """Train to an event that grows; returns the facts of just before it."""
    early = run.growth.loop.early
    assert early is not None
    while run.now < STEPS * 2 // 3:
        given = run.train()
        before = run.facts()
        run.growth.step(*given)
        if early.open is not None:
            return before
    raise AssertionError("nothing grew")


def take_back(run: Run) -> None:
    """Judge the event against a loss that nothing can fall below."""
    early = run.growth.loop.early
    assert early is not None
    assert early.open is not None
    early.open.held_out, early.open.extended, early.open.until = -1.0, True, run.growth.steps + 1
    run.step()
    assert early.open is None


CASES = [(h, o) for h in HOSTS for o in OPTIMIZERS]


@pytest.mark.parametrize("later", [0, 5])
@pytest.mark.parametrize(("host", "optimizer"), CASES)
def test_everything_is_as_it_was_before_the_event(host: str, optimizer: str, later: int) -> None:
    run = Run(host, optimizer)
    before = until_grown(run)
    assert run.growth.plans
    assert not same(run.facts(), before)
    early = run.growth.loop.early
    assert early is not None
    assert early.open is not None
    for _ in range(later):
        run.step()
    assert early.open is not None, "judged before its time"
    parameters = {n: id(p) for n, p in run.net.named_parameters()}
    rate, moved = run.optimizer.param_groups[0]["lr"], run.scheduler.last_epoch
    early.insertion.restore(early.open.before)
    after = run.facts()
    assert before.keys() == after.keys()
    wrong = [name for name in before if not same(before[name], after[name])]
    assert not wrong
    assert not run.growth.plans
    kept = {n: id(p) for n, p in run.net.named_parameters()}
    assert all(parameters[n] == own for n, own in kept.items())
    assert run.optimizer.param_groups[0]["lr"] == rate
    assert run.scheduler.last_epoch == moved
    listed = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert listed == set(kept.values())


@pytest.mark.parametrize(("host", "optimizer"), CASES)
def test_training_goes_on_as_if_nothing_had_happened_but_the_steps(host: str, optimizer: str) -> None:
    """From the weights of before the event, at the rates of now: as a twin does that was never grown."""
    run = Run(host, optimizer)
    until_grown(run)
    take_back(run)
    early = run.growth.loop.early
    assert early is not None
    run.growth.pause()
    twin_net = copy.deepcopy(run.net)
    twin_optimizer = OPTIMIZERS[optimizer](twin_net.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    for _ in range(6):
        rate = run.optimizer.param_groups[0]["lr"]
        twin_optimizer.param_groups[0]["lr"] = rate
        batch = clusters(run.now)

        def closure(given: Any = batch) -> float:
            twin_optimizer.zero_grad()
            loss = loss_fn(twin_net, given)
            loss.backward()
            return float(loss.detach())

        run.step()
        twin_optimizer.step(closure)
    for own, other in zip(run.net.parameters(), twin_net.parameters(), strict=True):
        assert torch.equal(own, other)
    assert len(run.growth.plans) == 0
    run.growth.resume()
    while run.now < STEPS:
        run.step()
    run.growth.finish()
    assert all(bool(torch.isfinite(p).all()) for p in run.net.parameters())


def test_what_was_taken_back_is_told_and_reported() -> None:
    run = Run("widths", "Adam")
    size = sum(p.numel() for p in run.net.parameters())
    until_grown(run)
    assert sum(p.numel() for p in run.net.parameters()) > size
    at = run.growth.steps
    take_back(run)
    (told,) = [e for e in run.events if e.kind == "taken_back"]
    assert (told.data["to"], told.data["lost"], told.data["parameters"]) == (at, 1, size)
    outcomes = [e for e in run.events if e.kind == "outcome"]
    assert outcomes
    assert not any(e.data["kept"] for e in outcomes)
    assert run.growth.report().events[-1].verdict == "taken back"
    assert any("taken back" in one for one in run.growth.report().advice)
    assert run.growth.events_kept == 0


def test_a_new_loss_can_be_computed_at_once_and_the_old_one_is_a_number() -> None:
    run = Run("BatchNorm", "Adam")
    until_grown(run)
    batch, loss = run.train()
    early = run.growth.loop.early
    assert early is not None
    assert early.open is not None
    early.open.held_out, early.open.extended, early.open.until = -1.0, True, run.growth.steps + 1
    run.growth.step(batch, loss)
    assert float(loss.detach()) > 0
    assert all(p.grad is None for p in run.net.parameters())
    fresh = loss_fn(run.net, clusters(77))
    fresh.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in run.net.parameters())


@pytest.mark.parametrize(
    ("host", "optimizer", "way"),
    [("widths", "Adam", "output"), ("BatchNorm", "AdamW", "shrink")],
    ids=["a multiplied output layer", "shrunk weights and cleared moments"],
)
def test_what_was_reopened_comes_back_too(host: str, optimizer: str, way: str) -> None:
    run = Run(host, optimizer, config={"early": {"enough": 0.0, "reopen": way}})
    before = until_grown(run)
    early = run.growth.loop.early
    assert early is not None
    assert early.open is not None
    assert early.open.record.reopened == way
    early.insertion.restore(early.open.before)
    after = run.facts()
    assert [name for name in before if not same(before[name], after[name])] == []
