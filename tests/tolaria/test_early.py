"""The early recipe from end to end, on problems small enough to train for real."""

from __future__ import annotations

import copy
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

import esper
from esper.contracts import Event
from esper.errors import ConfigError
from esper.tolaria.growth.early.judged import Judged
from esper.tolaria.growth.run.account import EventRecord, Looked, Report, advise
from esper.tolaria.growth.run.telling import seen_at_event

STEPS, CLASSES = 200, 8
Batch = tuple[Tensor, Tensor]


def clusters(seed: int, examples: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (examples,), generator=generator)
    return 2 * torch.eye(CLASSES)[label] + 0.3 * torch.randn(examples, CLASSES, generator=generator), label


def noise(seed: int, examples: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, CLASSES, generator=generator), torch.randint(
        CLASSES, (examples,), generator=generator
    )


def teacher(seed: int, examples: int = 64) -> Batch:
    generator, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 8, generator=fixed) for _ in range(2))
    x = torch.randn(examples, 8, generator=generator)
    return x, (x @ first).sin() @ second


def squared(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def small(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 8))


def cosine(optimizer: Any) -> Any:
    return CosineAnnealingLR(optimizer, STEPS)


class Run:
    """A net on its way, with all that it told."""

    def __init__(
        self,
        data: Callable[[int], Batch] = clusters,
        schedule: Callable[[Any], Any] | None = cosine,
        net: nn.Module | None = None,
        grow: bool = True,
        loss: Callable[[nn.Module, Any], Tensor] = loss_fn,
        **options: Any,
    ) -> None:
        self.data, self.loss = data, loss
        self.net = small() if net is None else net
        self.optimizer = Adam(self.net.parameters(), lr=0.01)
        self.scheduler = None if schedule is None else schedule(self.optimizer)
        self.events: list[Event] = []
        self.now = 0
        given: dict[str, Any] = {"steps": STEPS, "growth": "early", **options}
        given.setdefault("probe", [data(100_000 + i) for i in range(8)])
        given.setdefault("schedulers", [self.scheduler] if self.scheduler else [])
        self.growth: Any = None
        if grow:
            self.growth = esper.grow(self.net, self.optimizer, loss, on_event=self.events.append, **given)

    def learn(self) -> tuple[Batch, Tensor]:
        """Do what a user does in one step, but for the line that grows."""
        batch = self.data(self.now)
        self.now += 1
        loss = self.loss(self.net, batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        return batch, loss

    def step(self) -> None:
        batch, loss = self.learn()
        if self.growth is not None:
            self.growth.step(batch, loss)

    def to(self, step: int) -> Run:
        while self.now < step:
            self.step()
        return self

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    def held_out(self) -> float:
        with torch.no_grad():
            return sum(float(self.loss(self.net, self.data(200_000 + i))) for i in range(8)) / 8


# -- what it is for --------------------------------------------------------------------------------------


def test_a_net_that_is_too_small_grows_early_at_all_places_at_once_and_is_better_for_it() -> None:
    run, twin = Run().to(STEPS), Run(grow=False).to(STEPS)
    run.growth.finish()
    widened = run.told("widened")
    first = min(event.step for event in widened)
    assert first < STEPS / 4
    assert {event.data["site"] for event in widened if event.step == first} == {"0>2", "2>4"}
    assert run.size > 1.5 * twin.size
    assert run.held_out() < 0.7 * twin.held_out()
    assert type(run.net) is nn.Sequential
    assert [type(m) for m in run.net] == [nn.Linear, nn.Tanh, nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        lambda o: OneCycleLR(o, 0.03, total_steps=STEPS + 1),
        lambda o: StepLR(o, STEPS // 2),
    ],
    ids=["constant", "OneCycle", "steps"],
)
@pytest.mark.parametrize("told", [True, False])
def test_it_grows_under_any_schedule_given_or_not(schedule: Any, told: bool) -> None:
    run = Run(schedule=schedule, **({} if told else {"schedulers": []})).to(STEPS)
    run.growth.finish()
    assert run.told("widened")
    assert all(event.step <= 0.6 * STEPS for event in run.told("decision"))
    unread = [one for one in run.growth.report().advice if "pass it as schedulers=" in one]
    assert len(unread) == (schedule is not None and not told)


def grown_step(run: Run) -> Batch:
    """Train to the first event that grows; leaves logits of before and after it on the run."""
    x = run.data(300_000)[0]
    while run.now < STEPS:
        batch, loss = run.learn()
        run.net.eval()
        before = run.net(x).detach()
        run.net.train()
        run.growth.step(batch, loss)
        if run.growth.loop.early.open is not None:
            run.net.eval()
            after = run.net(x).detach()
            run.net.train()
            return before, after
    raise AssertionError("nothing grew")


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 8))


@pytest.mark.parametrize("make", [small, normed])
def test_nothing_the_model_says_changes_at_the_moment_of_an_event(make: Callable[[], nn.Module]) -> None:
    before, after = grown_step(Run(net=make(), config={"early": {"reopen": "no"}}))
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [small, normed])
def test_a_host_that_is_reopened_keeps_every_argmax(make: Callable[[], nn.Module]) -> None:
    run = Run(net=make(), config={"early": {"reopen": "output"}})
    before, after = grown_step(run)
    assert run.told("reopened")
    assert torch.equal(before.argmax(1), after.argmax(1))
    assert torch.allclose(0.3 * before, after, rtol=1e-4, atol=1e-5)


# -- what it leaves alone --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_where_nothing_can_be_learned_every_weight_is_that_of_a_twin_without_esper(seed: int) -> None:
    def data(step: int) -> Batch:
        return noise(step + 10_000_000 * seed)

    run, twin = Run(data, net=small(seed)), Run(data, net=small(seed), grow=False)
    torch.manual_seed(1)
    run.to(STEPS)
    run.growth.finish()
    stream = torch.random.get_rng_state()
    torch.manual_seed(1)
    twin.to(STEPS)
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert run.growth.report().events, "it was looked at"
    assert not run.growth.plans
    for own, other in zip(run.net.parameters(), twin.net.parameters(), strict=True):
        assert torch.equal(own, other)


def test_growth_off_trains_as_always_and_says_so() -> None:
    run, twin = Run(growth="off").to(50), Run(grow=False).to(50)
    assert not run.growth.growing
    assert str(run.growth)
    run.growth.finish()
    assert not run.told("decision")
    for own, other in zip(run.net.parameters(), twin.net.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_frozen_host_is_raced_for_and_one_that_trains_grows_early() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    assert Run(net=net, growth="auto").growth.run.recipe == "early"
    net[0].requires_grad_(False)
    net[2].weight.requires_grad_(False)
    assert Run(net=net, growth="auto").growth.run.recipe == "incubate"


# -- when ------------------------------------------------------------------------------------------------


def test_without_steps_a_loss_that_stalls_brings_an_event() -> None:
    run = Run(steps=None, schedule=None, config={"schedule": {"plateau_window": 20}}).to(600)
    run.growth.finish()
    assert run.told("widened")
    assert any("steps is not given" in event.data["message"] for event in run.told("warning"))


def test_a_paused_run_decides_nothing_until_it_is_resumed() -> None:
    run = Run()
    run.growth.pause()
    run.to(STEPS // 2)
    assert not run.told("decision")
    run.growth.resume()
    run.to(STEPS)
    found = run.told("decision")
    assert found[0].step == STEPS // 2 + 1, "what was due in the meantime comes at once"


def test_growth_that_is_asked_for_comes_at_once_and_nowhere_else() -> None:
    run = Run()
    first = run.growth.report().due[0]
    run.to(first - 3)
    run.growth.grow_now("2>4")
    run.step()
    found = run.told("decision")
    assert [event.step for event in found] == [first - 2]
    assert found[0].data["reason"].startswith("asked for")
    assert found[0].data["site"] in ("2>4", None)


def test_growing_tells_whether_the_probe_is_still_needed() -> None:
    run = Run()
    told = []
    while run.now < STEPS:
        assert run.growth.growing or not (run.growth.loop.early.open or run.growth.report().due)
        told.append(run.growth.growing)
        run.step()
    assert told[0]
    assert not run.growth.growing
    assert sorted(told, reverse=True) == told, "once it is over it stays so"
    run.growth.finish()
    assert not run.growth.growing


# -- the budget ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        ({"parameters": 140}, 140),
        ({"growth_factor": 2.0}, None),
        ({"parameters": 75}, 75),
    ],
)
def test_no_run_ends_larger_than_its_budget(budget: dict[str, Any], most: int | None) -> None:
    host = sum(p.numel() for p in small().parameters())
    run = Run(budget=budget).to(STEPS)
    run.growth.finish()
    limit = most or int(budget["growth_factor"] * host)
    assert run.size <= limit
    if limit > host + 2:
        assert run.size > 0.8 * limit, "the budget is there to be spent"
    else:
        assert any("budget" in one for one in run.growth.report().advice)


def test_forward_flops_are_a_budget_too() -> None:
    host = Run(grow=True).growth.run.morphable.flops
    run = Run(budget={"growth_factor": 20.0, "flops_factor": 1.5}).to(STEPS)
    run.growth.finish()
    assert host < run.growth.run.morphable.flops <= 1.5 * host
    count = Run(budget={"growth_factor": 20.0, "model_flops": int(1.5 * host)}).to(STEPS)
    assert count.growth.run.morphable.flops <= 1.5 * host


def test_events_are_a_budget_too() -> None:
    run = Run(budget={"growth_factor": 20.0, "growth_events": 1}).to(STEPS)
    run.growth.finish()
    assert len({event.step for event in run.told("widened")}) == 1


# -- what a user may bring -------------------------------------------------------------------------------


def test_gradients_may_be_accumulated() -> None:
    run = Run(steps=STEPS // 4, schedule=None)
    for step in range(STEPS):
        batch = clusters(step)
        loss = loss_fn(run.net, batch)
        (loss / 4).backward()
        if step % 4 == 3:
            run.optimizer.step()
            run.optimizer.zero_grad()
        run.growth.step(batch, loss)
    assert run.growth.steps == STEPS // 4
    assert run.told("widened")
    run.growth.finish()


def test_several_optimizers_and_a_scaler_that_is_off() -> None:
    net = small()
    optimizers = {
        "first": SGD(net[0].parameters(), 0.1, momentum=0.9),
        "rest": Adam(net[2:].parameters(), 0.01),
    }
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    growth = esper.grow(
        net,
        optimizers,
        loss_fn,
        probe=[clusters(100_000, 512)],
        steps=STEPS,
        growth="early",
        scaler=scaler,
    )
    for step in range(STEPS):
        batch = clusters(step)
        loss = loss_fn(net, batch)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        scaler.scale(loss).backward()
        for optimizer in optimizers.values():
            scaler.step(optimizer)
        scaler.update()
        growth.step(batch, loss)
    assert growth.plans
    growth.finish()
    held = {id(p) for o in optimizers.values() for g in o.param_groups for p in g["params"]}
    assert held == {id(p) for p in net.parameters()}


def test_the_governor_may_watch_and_an_event_is_no_alarm() -> None:
    run = Run(config={"governor": {"enabled": True, "every": 5}, "early": {"reopen": "output"}}).to(STEPS)
    assert run.told("widened")
    assert not run.told("rolled_back")
    run.growth.finish()


class Pairs(nn.Module):
    """Sees two views of everything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=1)


def views(seed: int, examples: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 8, generator=generator)
    return x, x + 0.1 * torch.randn(examples, 8, generator=generator)


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    one, other = model(torch.cat([batch[0], batch[1]])).chunk(2)
    return F.cross_entropy(one @ other.T / 0.1, torch.arange(len(one)))


def test_a_loss_whose_examples_depend_on_each_other_is_judged_by_blocks() -> None:
    run = Run(views, net=Pairs(), loss=contrastive, probe=[views(100_000 + i) for i in range(32)]).to(STEPS)
    assert run.growth.loop.early.evidence.independent is False
    run.growth.finish()
    assert run.told("widened")
    gates = run.told("gate")
    assert all(event.data["p_value"] is None or event.data["p_value"] > 0 for event in gates)


# -- what it says ----------------------------------------------------------------------------------------


def test_a_run_can_be_read_in_python() -> None:
    run = Run().to(STEPS)
    run.growth.epoch({"accuracy": 0.5})
    run.growth.finish()
    text = str(run.growth)
    assert f"→ {run.size:,}" in text
    assert "0>2 (2 units): +" in text
    report = run.growth.report().to_dict()
    assert json.loads(json.dumps(report)) == report
    assert report["parameters"][1] == run.size
    assert report["events"][0]["verdict"] in ("kept", "taken back", "nothing")
    curve = run.growth.curve()
    assert json.loads(json.dumps(curve))
    assert curve[0]["parameters"] < curve[-1]["parameters"]
    assert all(a["step"] <= b["step"] for a, b in itertools.pairwise(curve))
    assert all(a["spent_flops"] <= b["spent_flops"] for a, b in itertools.pairwise(curve))


def test_a_probe_on_which_nothing_could_pass_is_named() -> None:
    run = Run(probe=[clusters(100_000, 8)]).to(STEPS)
    run.growth.finish()
    assert not run.growth.plans
    advice = run.growth.report().advice
    assert any("the probe has 8 examples" in one for one in advice), advice


def test_a_budget_without_room_is_named() -> None:
    run = Run(budget={"parameters": 75}).to(STEPS)
    assert any("budget" in one for one in run.growth.report().advice)


# -- evidence from the stream ----------------------------------------------------------------------------


def streamed(**options: Any) -> Run:
    return Run(probe="stream", example=clusters(99), **options)


def test_evidence_from_the_stream_begins_at_the_step_after_the_event() -> None:
    """The batches that come next, each of them, until there are enough."""
    run = streamed()
    evidence, seen, opened = run.growth.loop.early.evidence, list[bool](), 1
    while run.now < STEPS:
        batch, loss = run.learn()
        run.growth.step(batch, loss)
        if evidence.waiting is not None:
            seen += (
                [any(torch.equal(one[0], batch[0]) for one in evidence.coming)]
                if run.growth.steps > opened
                else []
            )
        else:
            opened = run.growth.steps + 1
    assert len(seen) > 4
    assert all(seen)
    assert run.told("widened")


def test_an_event_is_judged_by_the_losses_of_now() -> None:
    """Also the last one, behind which nothing else is due."""
    run = streamed(budget={"growth_events": 1}, config={"early": {"shares": (0.1,)}})
    early = run.growth.loop.early
    recent: list[float] = []
    while run.now < STEPS:
        judged = early.open
        batch, loss = run.learn()
        recent.append(float(loss.detach()))
        run.growth.step(batch, loss)
        if judged is not None and (early.open is None or judged.extended):
            now = run.growth.curve()[-1]["held_out"]
            assert now == pytest.approx(sum(recent[-21:-1]) / 20)
            break
    else:
        raise AssertionError("nothing was judged")


def test_a_run_on_its_stream_goes_on_bit_for_bit_while_evidence_is_gathered() -> None:
    whole_run, states = streamed(), {}
    while whole_run.now < STEPS:
        whole_run.step()
        if whole_run.growth.loop.early.evidence.waiting is not None:
            states[whole_run.now] = state_of(whole_run)
    whole_run.growth.finish()
    assert len(states) > 5
    for cut, state in list(states.items())[::3]:
        run = gone_on(streamed(), state, cut)
        for own, other in zip(run.net.parameters(), whole_run.net.parameters(), strict=True):
            assert torch.equal(own, other), cut


# -- saving and going on ---------------------------------------------------------------------------------


def state_of(run: Run) -> list[Any]:
    assert run.scheduler is not None
    parts = run.growth, run.net, run.optimizer, run.scheduler
    return copy.deepcopy([part.state_dict() for part in parts])


def gone_on(run: Run, state: list[Any], cut: int) -> Run:
    """Let a new run take over what another had at a step, and train to the end."""
    assert run.scheduler is not None
    for part, own in zip((run.growth, run.net, run.optimizer, run.scheduler), state, strict=True):
        part.load_state_dict(own)
    run.now = cut
    run.to(STEPS)
    run.growth.finish()
    return run


@pytest.fixture(scope="module")
def whole() -> tuple[dict[str, Tensor], list[Any], list[int]]:
    """A run without a break: its weights, a state at every 7th step, and where an event was open."""
    run = Run()
    states, opened = {}, []
    while run.now < STEPS:
        if run.now % 7 == 0:
            states[run.now] = state_of(run)
            if run.growth.loop.early.open is not None:
                opened.append(run.now)
        run.step()
    run.growth.finish()
    return {n: t.clone() for n, t in run.net.state_dict().items()}, states, opened


@pytest.mark.parametrize("cut", range(0, STEPS, 7))
def test_a_run_that_was_cut_anywhere_goes_on_bit_for_bit(whole: Any, cut: int, tmp_path: Path) -> None:
    reference, states, opened = whole
    assert opened, "no state was taken while an event was open"
    torch.save(states[cut], tmp_path / "state.pt")
    run = gone_on(Run(), torch.load(tmp_path / "state.pt", weights_only=True), cut)
    assert reference.keys() == run.net.state_dict().keys()
    for name, tensor in run.net.state_dict().items():
        assert torch.equal(reference[name], tensor), name


def test_the_state_of_another_recipe_is_refused() -> None:
    state = Run(growth="incubate").growth.state_dict()
    with pytest.raises(esper.errors.StateError, match="another recipe"):
        Run().growth.load_state_dict(state)


def test_a_grown_model_is_saved_and_rebuilt_with_torch_alone(tmp_path: Path) -> None:
    run = Run().to(STEPS)
    run.growth.finish()
    assert run.growth.plans
    x = clusters(7)[0]
    said = run.net(x).detach()
    folder = run.growth.save(tmp_path / "saved")
    assert torch.equal(esper.load_into(small(5), folder)(x), said)
    torch.save(x, tmp_path / "x.pt")
    script = f"""
import sys; sys.path.insert(0, {str(folder)!r})
import torch
from torch import nn
from rebuild import load
net = nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 8))
net = load(net)
assert "esper" not in sys.modules
torch.save(net(torch.load({str(tmp_path / "x.pt")!r})).detach(), {str(tmp_path / "y.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "y.pt"), said)


def test_the_trainer_grows_early_by_default() -> None:
    net = small()
    trainer = esper.Trainer(
        net,
        Adam(net.parameters(), 0.01),
        loss_fn,
        train=[clusters(i) for i in range(50)],
        probe=[clusters(100_000, 512)],
        epochs=4,
    )
    assert trainer.fit() is net
    assert trainer.growth.run.recipe == "early"
    assert trainer.growth.plans
    assert trainer.growth.finished
    assert trainer.history[-1]["train_loss"] < trainer.history[0]["train_loss"]


def test_too_small_a_probe_is_no_verdict_on_the_width_and_costs_nothing() -> None:
    """A probe on which nothing can pass says nothing about how wide the model is, and is not read."""
    run = Run(probe=[clusters(100_000, 8)]).to(STEPS)
    advice = " ".join(run.growth.report().advice)
    assert "the probe has 8 examples" in advice
    assert "wide enough" not in advice
    assert run.growth.cost.growth_flops == 0
    (event,) = run.growth.report().events
    assert {(one.grown, one.reason) for one in event.looked} == {(0, advice)}
    looked = [Looked("0>2", 2, 2, 0.5, 0.003)]
    told = advise([EventRecord(15, "scheduled", 1.0, 1.0, 270, looked)], [], [], 200)
    assert "wide enough" in " ".join(told)


def test_an_event_that_is_asked_for_reads_any_probe() -> None:
    """A user who names a place wants to know what is found there."""
    run = Run(probe=[clusters(100_000, 8)]).to(30)
    run.growth.grow_now(next(iter(run.growth.run.morphable.places)))
    run.to(STEPS)
    assert any(one.p_value is not None for event in run.growth.report().events for one in event.looked)


def test_a_run_that_ends_before_an_event_is_judged_keeps_it_unless_it_is_worse() -> None:
    """The evidence came first; what is left of the time is too short to ask for more."""
    run = Run()
    while not run.told("widened"):
        run.step()
    assert run.growth.loop.early.open is not None
    run.step()
    run.growth.finish()
    event = run.growth.report().events[-1]
    assert event.verdict == ("kept" if "→" in event.reason and run.growth.plans else "taken back")
    judged = Judged(Any, 10, 2.0, [], event)  # type: ignore[arg-type]
    assert [judged.won(1.999, partly) for partly in (True, False)] == [True, False]
    assert not judged.won(2.001, True)


def test_a_place_that_others_carried_says_so() -> None:
    one = Looked("0>2", 2, 2, 0.2, 0.001, 0.01, 10, 20, 2, "grown", together=0.0004)
    report = Report([EventRecord(15, "", 1.0, 1.0, 99, [one])], [], (1, 2), (1, 2), 0.1, [], [])
    told = "p 0.2 where 0.001 is needed, 0.0004 with all places together, gain 0.01 for 10 parameters"
    assert told in str(report)


def test_one_scheduler_may_be_given_alone() -> None:
    net = small()
    optimizer = Adam(net.parameters(), lr=0.01)
    growth = esper.grow(
        net, optimizer, loss_fn, probe=[clusters(1)], steps=STEPS, schedulers=cosine(optimizer)
    )
    assert growth.loop.early is not None
    assert growth.loop.early.timetable.due == Run().growth.loop.early.timetable.due
    with pytest.raises(ConfigError, match="has no step"):
        esper.grow(net, optimizer, loss_fn, probe=[clusters(1)], steps=STEPS, schedulers=0.5)


def test_class_weights_leave_each_example_evidence_of_its_own() -> None:
    """A mean by class weights has a common divisor; what the loss says of an example is its own."""
    weight = torch.linspace(1.0, 20.0, CLASSES)

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], weight=weight)

    run = Run(loss=weighted).to(STEPS)
    assert run.growth.loop.early.evidence.independent is True
    assert run.growth.plans


class Residual(nn.Module):
    """Adds an MLP of some inner width to a stream of eight."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, inner), nn.Linear(inner, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).relu())
        return y


@pytest.mark.parametrize(("inner", "widened"), [(2, True), (16, False)])
def test_what_is_narrow_inside_a_block_grows_to_the_width_of_the_stream(inner: int, widened: bool) -> None:
    """Wider, and blocks come instead."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Residual(inner)), nn.Linear(8, 8))
    config = {"early": {"false_keep": 0.4}}
    run = Run(teacher, None, net, loss=squared, budget={"parameters": 2000}, config=config).to(STEPS)
    run.growth.finish()
    assert len(net[1]) > 1
    assert (net[1][0].up.out_features > inner) is widened
    assert net[1][0].up.out_features <= max(inner, 8)


def test_a_race_is_not_said_to_have_had_no_event_due() -> None:
    """Where nothing grew early the advice is not about early events."""
    run = Run(growth="incubate").to(20)
    advice = " ".join(run.growth.report().advice)
    assert "raced" in advice
    assert "no event was due" not in advice
    assert Run(growth="off").to(20).growth.report().advice == ["growth is off"]


def test_a_place_that_waits_has_no_price_in_what_was_seen() -> None:
    waiting, asked = Looked("a>b", 32, reason="it waits"), Looked("b>c", 8, units=4, flops=48)
    record = EventRecord(5, "scheduled", 1.0, 1.0, 64, [waiting, asked])
    assert [one["unit_flops"] for one in seen_at_event(record, {})] == [None, 12]
