"""A seed's life in a real loop: stages in order, faults, decay, resuming in the middle of every stage."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import esper
from esper.config import Config
from esper.contracts import EVENT_FIELDS, Stage
from esper.errors import StateError
from esper.kasmina.race.exposing import worse
from esper.kasmina.race.lifecycle import FAULTS
from esper.kasmina.race.schedule import Timing
from esper.kasmina.race.trial import Training
from esper.kasmina.seeds.state import MOVES
from tests.kasmina.hosts import Loop, batch, frozen, holdings, loss_fn, same

FAST = {
    "schedule": {"warmup": 0.01},
    "race": {"steps": 8},
    "blend": {"ramp": 4, "stabilise": 2, "evaluate": 4},
}
LIFE = ["GERMINATED", "TRAINING", "GRAFTING", "STABILISING", "EVALUATING", "FOSSILISED", "DORMANT"]


def test_a_kept_seed_lives_through_every_stage_in_order_and_tells_of_it() -> None:
    loop = Loop("mlp", config=FAST).step(120)
    assert loop.growth is not None
    kept = [e for e in loop.of("outcome") if e.data["kept"]]
    assert kept, "nothing was kept: this host is far too narrow for its task"
    seed = next(e.data["seed"] for e in loop.of("stage") if e.data["target"] == "FOSSILISED")
    moves = [e for e in loop.of("stage") if e.data["seed"] == seed]
    end = [e.data["target"] for e in moves].index("DORMANT") + 1
    begin = max(i for i in range(end) if moves[i].data["target"] == "GERMINATED")
    assert [e.data["target"] for e in moves[begin:end]] == LIFE
    steps = {e.data["target"]: e.step for e in moves[begin:end]}
    assert steps["GRAFTING"] - steps["TRAINING"] == 8 + 4, "incubation, then batches no candidate has seen"
    assert steps["EVALUATING"] - steps["STABILISING"] == 2
    assert steps["FOSSILISED"] - steps["EVALUATING"] == 4
    alphas = [
        e.data["alpha"] for e in loop.of("alpha") if steps["GRAFTING"] <= e.step <= steps["STABILISING"]
    ]
    assert alphas == sorted(alphas)
    assert (alphas[0], alphas[-1]) == (0.25, 1.0)
    assert loop.of("gate")[-1].data["e_value"] is not None
    widened = loop.of("widened")[0]
    assert widened.data["difference"] < 1e-4
    assert loop.net.fc1.out_features == loop.net.fc1.weight.shape[0]
    assert sum(plan.units for plan in loop.growth.plans) == sum(e.data["units"] for e in loop.of("widened"))


def test_every_move_told_is_in_the_table_and_every_event_has_its_fields() -> None:
    loop = Loop("residual", config=FAST, steps=150).step(150)
    assert loop.growth is not None
    loop.growth.finish()
    for event in loop.of("stage"):
        assert Stage[event.data["target"]] in MOVES[Stage[event.data["source"]]]
    for event in loop.events:
        assert set(EVENT_FIELDS[event.kind]) <= set(event.data)
    decisions = {e.data["decision"] for e in loop.of("decision") if e.data["action"] == "widen"}
    assert decisions == {e.data["decision"] for e in loop.of("outcome")}
    for outcome in loop.of("outcome"):
        assert outcome.data["cost_flops"] > 0, "failures pay too"


# -- faults --


def raising(x: Tensor, hidden: bool = False) -> Tensor:
    raise ZeroDivisionError("a kernel's own fault")


def exposed(kind: str = "mlp") -> Loop:
    """A loop whose seed is at full α, with time left before it is judged."""
    slow = {**FAST, "blend": {"ramp": 2, "stabilise": 60, "evaluate": 60}}
    return Loop(kind, config=slow).until("STABILISING")


def broken(how: str, loop: Loop) -> str:
    kernel = loop.growth.run.orchestrator.oldest.kernel  # type: ignore[union-attr]
    if how == "raises":
        kernel.forward = raising
        return "ZeroDivisionError: a kernel's own fault"
    with torch.no_grad():
        if how == "shape":
            kernel.consumer_weight = nn.Parameter(kernel.consumer_weight[:, :, None])
            return "RuntimeError"
        kernel.producer_weight.fill_(float(how))
    return "a non-finite output"


@pytest.mark.parametrize("how", ["raises", "nan", "inf", "shape"])
def test_a_broken_kernel_never_stops_training_and_the_third_fault_culls_it(how: str) -> None:
    loop = exposed()
    growth = loop.growth
    assert growth is not None
    seed = growth.run.orchestrator.oldest.origin.seed  # type: ignore[union-attr]
    message = broken(how, loop)
    given = batch("mlp")
    before = loss_fn(loop.net, given)  # the first fault
    assert torch.isfinite(before)
    loop.step()
    assert len(loop.of("fault")) == 2
    assert growth.run.morphable.layout.stage_of(seed) is Stage.STABILISING
    loop.step()
    faults = loop.of("fault")
    assert [e.data["count"] for e in faults] == [1, 2, FAULTS]
    assert all(message in e.data["error"] for e in faults)
    fallbacks = [e for e in loop.of("fallback") if e.data["what"] == "kernel"]
    assert len(fallbacks) == 3
    told = [e.data["target"] for e in loop.of("stage")]
    assert told[-3:] == ["ERROR", "CULLED", "EMBARGOED"]
    assert not loop.of("outcome")[-1].data["kept"]
    assert growth.run.orchestrator.oldest is None
    assert torch.equal(loss_fn(loop.net, given).isfinite(), torch.tensor(True))
    assert all(bool(p.isfinite().all()) for p in loop.net.parameters())
    loop.step(5)
    net = growth.finish()
    assert holdings(net) == holdings(Loop("mlp", grow=False).net)


def test_fewer_than_three_faults_are_forgiven() -> None:
    loop = exposed()
    kernel = loop.growth.run.orchestrator.oldest.kernel  # type: ignore[union-attr]
    kernel.forward = raising
    loop.step(FAULTS - 1)
    del kernel.forward
    loop.step(3)
    assert loop.growth.run.orchestrator.oldest is not None  # type: ignore[union-attr]
    assert len(loop.of("fault")) == FAULTS - 1


def test_a_graft_that_makes_the_loss_worse_is_ramped_down_and_culled() -> None:
    loop = Loop("mlp", config={**FAST, "blend": {"ramp": 4, "stabilise": 2, "evaluate": 6}}).until(
        "EVALUATING"
    )
    growth = loop.growth
    assert growth is not None
    trial = growth.run.orchestrator.oldest
    assert trial is not None
    with torch.no_grad():  # every unit of it is now noise
        trial.kernel.consumer_weight.normal_(0, 30)  # type: ignore[union-attr]
    for group in trial.optimizer.param_groups:  # type: ignore[union-attr]
        group["lr"] = 0.0
    growth.run.parts.orchestrator.services.donor.owners.clear()  # no rate is taken over from the host
    width = loop.net.fc1.out_features, loop.net.fc2.out_features
    loop.until("EMBARGOED")
    outcome = loop.of("outcome")[-1].data
    assert (outcome["kept"], outcome["reason"]) == (False, "the loss is worse than before exposure")
    alphas = [e.data["alpha"] for e in loop.of("alpha")]
    assert alphas[-3:] == [0.75, 0.5, 0.25]
    assert (loop.net.fc1.out_features, loop.net.fc2.out_features) == width


def test_an_unfinished_seed_gets_a_last_gate_at_the_end() -> None:
    loop = exposed()
    assert loop.growth is not None
    units = loop.growth.run.orchestrator.oldest.origin.decision.width  # type: ignore[union-attr]
    before = sum(p.numel() for p in loop.net.parameters())
    x = loop.probe[0][0]
    loop.net.eval()
    with torch.no_grad():
        branch = loop.net(x)
    net = loop.growth.finish()
    torch.testing.assert_close(net(x), branch, rtol=1e-5, atol=1e-5)
    assert loop.of("outcome")[-1].data["kept"]
    assert sum(p.numel() for p in net.parameters()) > before
    assert [plan.units for plan in loop.growth.plans] == [units]
    assert holdings(net) == holdings(Loop("mlp", grow=False).net)


# -- resuming --

STEPS = 130


class Drop(nn.Module):
    """Everything that has state: statistics, dropout, a tied pair elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(10, 2), nn.BatchNorm1d(2), nn.Linear(2, 10)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dropout(torch.tanh(self.norm(self.fc1(x)))))


class Run:
    """A loop as users write it, with a scheduler; ``save`` and ``load`` are theirs too."""

    def __init__(self, **race: Any) -> None:
        torch.manual_seed(0)
        self.net = Drop()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=0.02)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.02, total_steps=STEPS + 1)
        blend = {"ramp": 5, "stabilise": 4, "evaluate": 5}
        config = {"schedule": {"warmup": 0.02}, "race": {"steps": 10, **race}, "blend": blend}
        self.events: list[Any] = []
        torch.manual_seed(9)
        self.growth = esper.grow(
            self.net,
            self.optimizer,
            loss_fn,
            probe=[batch("mlp", 256)],
            steps=STEPS,
            config=config,
            budget={"growth_factor": 10.0},
            growth="incubate",
            on_event=self.events.append,
        )
        torch.manual_seed(1)

    def stage(self) -> str:
        trial = self.growth.run.orchestrator.oldest
        if trial is None:
            return "dormant after a widening" if self.growth.plans else "dormant"
        stage = self.growth.run.morphable.layout.stage_of(trial.origin.seed).name
        if stage == "TRAINING" and isinstance(trial, Training) and len(trial.race.starts) < 8:
            return "TRAINING, halved"
        return stage + (", second growth" if self.growth.plans else "")

    def step(self) -> None:
        given = batch("mlp", 32)
        loss = loss_fn(self.net, given)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.growth.step(given, loss)

    def save(self) -> bytes:
        file = io.BytesIO()
        torch.save(
            {
                "growth": self.growth.state_dict(),
                "net": self.net.state_dict(),
                "random": torch.get_rng_state(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
            },
            file,
        )
        return file.getvalue()

    def load(self, saved: bytes) -> Run:
        state = torch.load(io.BytesIO(saved), weights_only=True)
        self.growth.load_state_dict(state["growth"])
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        return self

    def finish(self) -> Run:
        while self.growth.steps < STEPS:
            self.step()
        self.growth.finish()
        return self

    def result(self) -> list[Any]:
        cost = self.growth.cost
        return frozen(
            [
                dict(self.net.state_dict()),
                self.optimizer.state_dict(),
                torch.get_rng_state(),
                self.growth.run.tamiyo.state_dict(),
                cost.training_flops,
                cost.growth_flops,
                [(p.site, p.units) for p in self.growth.plans],
            ]
        )


@pytest.mark.parametrize("shadow_every", [1, 3])
def test_a_run_resumed_in_the_middle_of_any_stage_ends_bit_for_bit_the_same(shadow_every: int) -> None:
    whole, saved = Run(shadow_every=shadow_every), {}
    lasted: dict[str, int] = {}
    for _ in range(STEPS):
        whole.step()
        stage = whole.stage()
        lasted[stage] = lasted.get(stage, 0) + 1
        racing = stage.startswith(
            "TRAINING"
        )  # at the very beginning, in the middle, and waiting for unseen batches
        if lasted[stage] in ({1, 3, 12} if racing else {2}) and (racing or shadow_every == 1):
            saved[stage, lasted[stage]] = (whole.save(), whole.growth.steps)
    stages = {"TRAINING", "TRAINING, halved"}
    if shadow_every == 1:
        stages |= {
            "GRAFTING",
            "STABILISING",
            "EVALUATING",
            "dormant after a widening",
            "GRAFTING, second growth",
        }
    assert stages <= {stage for stage, _ in saved}, saved.keys()
    whole.growth.finish()
    expected = whole.result()
    for (stage, _), (state, step) in saved.items():
        resumed = Run(shadow_every=shadow_every).load(state)
        assert resumed.growth.steps == step
        assert resumed.stage() == stage
        for mine, theirs in zip(resumed.finish().result(), expected, strict=True):
            assert same(mine, theirs), f"resumed in {stage} at step {step}"
    if "GRAFTING" in {stage for stage, _ in saved}:  # once states knew α, and not its way
        kept, _ = next(kept for (stage, _), kept in saved.items() if stage == "GRAFTING")
        state = torch.load(io.BytesIO(kept), weights_only=True)
        state["growth"]["layout"]["slope"].zero_()
        torch.save(state, older := io.BytesIO())
        for mine, theirs in zip(Run().load(older.getvalue()).finish().result(), expected, strict=True):
            assert same(mine, theirs), "resumed from a state without slopes"


def test_a_state_of_another_model_or_version_is_refused() -> None:
    run = Run()
    state = run.growth.state_dict()
    other = Loop("residual").growth
    assert other is not None
    with pytest.raises(StateError, match="knows the site 'fc1>fc2', this model does not; known: "):
        other.load_state_dict(state)
    with pytest.raises(StateError, match="version 99; this Esper reads versions 2 and 3"):
        run.growth.load_state_dict({**state, "version": 99})
    run.step()
    with pytest.raises(StateError, match="has begun already"):
        run.growth.load_state_dict(state)


# -- parts --


@pytest.mark.parametrize(
    ("steps", "incubate", "ramp"), [(40, 8, 4), (1600, 100, 6), (None, 62, 4), (10**6, 200, 100)]
)
def test_stages_last_a_share_of_the_run_within_limits(steps: int | None, incubate: int, ramp: int) -> None:
    timing = Timing.of(Config(), steps, settling=0)
    assert (timing.incubate, timing.ramp, timing.evaluate) == (incubate, ramp, ramp)
    assert Timing.of(Config(), steps, settling=300).stabilise == 300


def test_worse_means_more_than_chance_explains() -> None:
    rng = np.random.default_rng(0)
    before = list(rng.normal(1, 0.1, 40))
    assert not worse(before, list(rng.normal(1, 0.1, 20)))
    assert worse(before, list(rng.normal(1.2, 0.1, 20)))
    assert not worse(before, list(rng.normal(0.5, 0.1, 20)))
    assert worse(before, [2.0])
    assert worse(before, [float("nan")] * 3)
    assert not worse([], [5.0])
    assert worse(before, [3.0, 9.0, 80.0, 2e6])  # its own spread must not excuse an explosion
