"""Where each stage of a seed's life turns: exact steps, losses at their limit, and the end of the run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from esper.contracts import Stage
from esper.distributed.collectives import Alone, digest
from esper.distributed.model_wrapper import Wrapping
from esper.kasmina.race.initialisers import STARTS
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.race.trial import Passed
from tests.kasmina.hosts import Loop, batch, frozen, same

ENDED, HARMLESS = "the run ended", "the run ended; no held-out gain"
WORSE = "the loss is worse than before exposure"


class Watching:
    """Notes what a guard is told."""

    def __init__(self) -> None:
        self.moves: list[tuple[str, str, int]] = []
        self.shapes = 0

    def moved(self, site: str, target: Stage, step: int) -> None:
        self.moves.append((site, target.name, step))

    def reshaped(self) -> None:
        self.shapes += 1

    def expect(self, step: int, why: str, steps: int | None = None) -> None:
        raise AssertionError("nobody asks for it here")


class Seed:
    """A loop stopped where its seed has just entered a stage; from there it is moved by hand."""

    def __init__(self, stage: str, evaluate: int = 3, embargo: float = 0.05, **race: Any) -> None:
        config = {
            "schedule": {"warmup": 0.01, "embargo": embargo},
            "race": {"steps": 8, **race},
            "blend": {"ramp": 3, "stabilise": 2, "evaluate": evaluate},
        }
        self.loop = Loop("mlp", config=config).until(stage)
        growth: Any = self.loop.growth
        self.run = growth.run
        self.own: SeedOrchestrator = growth.run.orchestrator
        self.told = len(self.loop.events)

    @property
    def trial(self) -> Any:
        assert self.own.oldest is not None
        return self.own.oldest

    def advance(self, *losses: float) -> list[Any]:
        return [self.one(loss) for loss in losses]

    def one(self, loss: float, batches: tuple[Any, ...] = ()) -> Any:
        """Let the seed do one step's work."""
        key = self.trial.origin.key
        self.own.begin(loss, self.own.step + 1)
        outcome = self.own.advance(key, batches, loss)
        self.own.examples = 0
        return outcome

    def settle(self) -> Any:
        return self.own.settle(self.trial.origin.key)

    def commit_waiting(self) -> Any:
        return self.own.commit_waiting(self.trial.origin.key)

    def turn(self, phase: Any) -> Any:
        """Let the trial go on from another phase."""
        return self.own.put(phase)

    def targets(self) -> list[str]:
        return [e.data["target"] for e in self.loop.events[self.told :] if e.kind == "stage"]

    def alphas(self) -> list[float]:
        return [e.data["alpha"] for e in self.loop.events[self.told :] if e.kind == "alpha"]


# -- beginning --


def test_a_fresh_orchestrator_cools_nothing_and_keeps_twenty_losses_or_two_evaluations() -> None:
    for evaluate, kept in ((3, 20), (10, 20), (30, 60)):
        blend = {"ramp": 3, "evaluate": evaluate}
        growth: Any = Loop("mlp", config={"schedule": {"warmup": 0.01}, "blend": blend}).growth
        own = growth.run.orchestrator
        assert (own.step, own.examples, own.lineage, own.cool_until) == (0, 0, 0, -1)
        assert (own.oldest, own.trials, own.untold, own.noted) == (None, {}, [], {})
        assert not own.cooling()
        assert own.losses.maxlen == kept
        own.share([])  # nobody is exposed: nothing to count


def test_candidates_begin_as_decided_and_half_of_them_drop_out_thrice() -> None:
    seed = Seed("TRAINING", steps=32)
    trial = seed.trial
    assert trial.origin.layer.tap is trial.tap
    sown = STARTS[trial.origin.decision.start or ""]
    assert [start == "svd" for start in trial.race.starts] == [i < 8 * sown for i in range(8)]
    assert seed.loop.events[-1].data["reason"] == f"8 candidates of {trial.origin.decision.width} units"
    left = []
    for _ in range(8):
        seed.loop.step()
        left.append(len(trial.race.starts))
    assert left == [8, 4, 4, 2, 2, 2, 2, 1]  # after a 16th, an eighth and a quarter of the race


@pytest.mark.parametrize(("every", "tapped"), [(None, {8}), (3, {1, 3, 4, 6, 7, 8})])
def test_gradients_are_noted_ahead_of_lessons_from_them_and_at_the_end(
    every: int | None, tapped: set[int]
) -> None:
    seed = Seed("TRAINING", shadow_every=every)
    layer, noted = seed.trial.origin.layer, set()
    for age in range(1, 9):
        seed.loop.step()
        if layer.tap is not None:
            noted.add(age)
    assert noted == tapped


def test_without_a_fresh_gradient_the_lesson_is_taken_behind_the_real_loss() -> None:
    seed = Seed("TRAINING", shadow_every=3)
    trial, ledger = seed.trial, seed.own.services.ledger
    trial.tap.gradient = None
    before, paid = frozen(trial.race.parameters), ledger.growth_flops
    seed.one(2.0, (batch("mlp", 32),))
    assert not same(dict(trial.race.parameters), before)
    assert ledger.growth_flops > paid


def test_unseen_batches_are_waited_for() -> None:
    seed = Seed("TRAINING")
    began = seed.own.step
    seed.loop.step(11)
    assert seed.targets() == []
    seed.loop.step()
    assert seed.targets() == ["GRAFTING"]
    assert seed.own.step - began == 8 + 4


def test_losses_before_exposure_are_kept_and_none_after() -> None:
    seed = Seed("GRAFTING")
    before = list(seed.own.losses)
    assert seed.trial.before == before
    assert len(before) == min(20, seed.own.step)
    seed.advance(5.0, 6.0)
    assert list(seed.own.losses) == before


# -- exposure --


def test_alpha_climbs_by_a_third_and_every_move_is_told_to_the_guard() -> None:
    seed = Seed("GRAFTING")
    guard = seed.own.guard = Watching()
    began, site = seed.own.step, seed.trial.origin.decision.site
    assert float(seed.run.morphable.layout.alpha[seed.trial.origin.seed]) == pytest.approx(1 / 3)
    assert seed.trial.origin.layer.exposed
    seed.advance(*[0.0] * 5)
    assert seed.alphas()[:2] == [0.666667, 1.0]
    assert guard.moves == [(site, "STABILISING", began + 3), (site, "EVALUATING", began + 5)]


def test_a_step_of_the_kernel_is_paid_three_passes_of_its_units() -> None:
    seed = Seed("STABILISING")
    ledger, trial = seed.own.services.ledger, seed.trial
    seed.own.examples, before = 5, ledger.growth_flops
    seed.advance(0.0)
    assert (
        ledger.growth_flops - before
        == 3 * trial.origin.decision.width * trial.origin.layer.place.site.unit_flops * 5
    )
    assert seed.own.examples == 0


def test_vitals_are_measured_where_the_next_step_is_due() -> None:
    seed = Seed("STABILISING")
    layout = seed.run.morphable.layout
    layout.sampling = 4
    for step, due in ((102, False), (103, True), (104, False), (105, False)):
        seed.own.step = step
        seed.own.exposing.train_kernel(seed.trial, 0)
        assert seed.trial.origin.layer.sampling is due


# -- judgement --

BEFORE = [0.0, 0.0, 0.0, 4.0]  # mean 1, of variance 1
AT = [2.5, 3.5, 4.5]  # mean 3.5, of variance 1/3: the limit is 1 + 2 √(4/3) = 3.309


def test_a_loss_at_ease_is_kept_after_exactly_so_many_steps() -> None:
    seed = Seed("EVALUATING")
    guard = seed.own.guard = Watching()
    seed.trial.before[:] = BEFORE
    *waits, outcome = seed.advance(*[one - 0.25 for one in AT])  # 3.25
    assert waits == [None, None]
    assert (outcome.kept, outcome.reason) == (True, "kept")
    assert seed.own.untold == [outcome]
    assert seed.targets() == ["FOSSILISED", "DORMANT"]
    assert guard.shapes == 1
    assert seed.own.oldest is None
    assert not seed.own.cooling(), "what was kept need not cool down"


def test_a_worse_loss_is_taken_down_by_thirds_and_dropped() -> None:
    seed = Seed("EVALUATING")
    seed.trial.before[:] = BEFORE
    site, began = seed.trial.origin.decision.site or "", seed.own.step
    assert seed.advance(*AT) == [None] * 3
    assert seed.trial.ending == WORSE
    first, second, outcome = seed.advance(*[9.0] * 3)
    assert (first, second) == (None, None)
    assert seed.alphas() == [0.666667, 0.333333]
    assert (outcome.kept, outcome.reason, outcome.parameters, outcome.flops) == (False, WORSE, 0, 0)
    assert seed.targets() == ["CULLED", "EMBARGOED"]
    ended, embargo = began + 6, seed.own.timing.embargo
    assert embargo == 10  # .05 of 200 steps
    own = seed.own
    for ahead, asleep in ((embargo - 1, True), (embargo, False)):
        assert own.embargoed(site)
        own.step = ended + ahead
        assert own.cooling()
        own.wake_embargoed(own.step)
        assert own.embargoed(site) is asleep
    told = seed.loop.events[-1]
    assert (told.data["source"], told.data["target"]) == ("EMBARGOED", "DORMANT")
    assert told.data["reason"] == "the cool-down is over"
    own.step = ended + embargo + 2
    assert not own.cooling()


def test_where_layers_keep_their_shapes_a_kept_kernel_waits() -> None:
    seed = Seed("EVALUATING")
    wrapping = Wrapping(seed.loop.net)
    wrapping.deferred = True
    seed.own.services = replace(seed.own.services, wrapping=wrapping)
    assert seed.commit_waiting() is None
    seed.trial.before[:] = BEFORE
    assert seed.advance(0.0, 0.0, 0.0, 0.0) == [None] * 4
    assert isinstance(seed.trial, Passed)
    assert len(seed.trial.after) == 3
    warned = [e.data["message"] for e in seed.loop.of("warning")]
    assert [one for one in warned if "stays a branch until growth.rewrap() is called" in one]
    outcome = seed.commit_waiting()
    assert outcome is not None
    assert outcome.kept


def test_what_waits_where_the_layer_is_gone_is_dropped() -> None:
    seed = Seed("EVALUATING")
    seed.turn(seed.trial.passed())
    setattr(seed.loop.net, seed.trial.origin.layer.place.site.entry, nn.Linear(10, 3))
    outcome = seed.commit_waiting()
    assert outcome is not None
    assert not outcome.kept
    assert "was replaced or removed" in outcome.reason


# -- the end of the run --


def test_without_a_kernel_the_end_drops_the_seed() -> None:
    outcome = Seed("TRAINING").settle()
    assert outcome is not None
    assert (outcome.kept, outcome.reason, outcome.gain) == (False, ENDED, None)


@pytest.mark.parametrize("stage", ["GRAFTING", "STABILISING", "EVALUATING"])
def test_an_exposed_seed_that_gains_goes_through_what_is_left(stage: str) -> None:
    seed = Seed(stage)
    outcome = seed.settle()
    assert outcome is not None
    assert outcome.kept
    left = {"GRAFTING": ["STABILISING", "EVALUATING"], "STABILISING": ["EVALUATING"], "EVALUATING": []}
    assert seed.targets() == [*left[stage], "FOSSILISED", "DORMANT"]


def test_an_exposed_seed_without_any_gain_is_dropped_at_the_end() -> None:
    seed = Seed("STABILISING")
    with torch.no_grad():
        for parameter in seed.trial.kernel.parameters():
            parameter.zero_()
    outcome = seed.settle()  # the losses are the same: a gain of exactly nought
    assert outcome is not None
    assert (outcome.kept, outcome.reason) == (False, HARMLESS)


def test_a_seed_on_its_way_down_is_dropped_at_the_end() -> None:
    seed = Seed("EVALUATING")
    seed.turn(seed.trial.decaying(WORSE))
    outcome = seed.settle()
    assert outcome is not None
    assert (outcome.kept, outcome.reason) == (False, ENDED)


class Refusing:
    """Puts everything back."""

    def keep(self, *_: object) -> str:
        return "the widened layers differ"


def test_what_cannot_be_made_part_of_the_layers_is_dropped_with_the_reason() -> None:
    for ends in (True, False):
        seed = Seed("EVALUATING")
        seed.own.services = replace(seed.own.services, committer=Refusing())
        seed.trial.before[:] = BEFORE
        outcome = seed.settle() if ends else seed.advance(*[0.0] * 6)[-1]
        assert outcome is not None
        assert (outcome.kept, outcome.reason) == (False, "the widened layers differ")
        assert seed.targets() == ["CULLED", "EMBARGOED"]


# -- faults, among processes, and the digest --


def test_the_third_fault_ends_a_seed_and_no_fourth_is_counted() -> None:
    seed = Seed("STABILISING")
    layout, trial = seed.run.morphable.layout, seed.trial
    seed.own.noted = {seed.trial.origin.key: ["mine"]}
    assert seed.own.faults_noted() == [1]
    seed.own.share([2])
    assert [e.data["error"] for e in seed.loop.of("fault")] == ["mine", "in another process"]
    assert layout.stage_of(trial.origin.seed) is Stage.STABILISING
    assert trial.origin.layer.exposed
    seed.own.share([7])
    assert [e.data["count"] for e in seed.loop.of("fault")] == [1, 2, 3]
    assert layout.stage_of(trial.origin.seed) is Stage.ERROR
    assert not trial.origin.layer.exposed
    (outcome,) = seed.advance(0.0)
    assert (outcome.kept, outcome.reason) == (False, "three faults")
    assert int(layout.faults[trial.origin.seed]) == 0, "the next seed there begins without"


def test_where_a_pass_failed_here_only_the_gradient_is_nought() -> None:
    seed = Seed("STABILISING")
    first, *others = seed.trial.kernel.parameters()
    first.grad = None
    for parameter in others:
        parameter.grad = torch.ones_like(parameter)
    seed.own.share([0])
    assert first.grad is not None
    assert not first.grad.any()
    assert all(bool((parameter.grad == 1).all()) for parameter in others)


class Two(Alone):
    """Two processes that say the same."""

    world = 2


def test_a_fault_is_noted_until_all_processes_know_and_counted_at_once_alone() -> None:
    seed = Seed("STABILISING")
    key = seed.trial.origin.key
    seed.own.fault(key, "alone")
    assert (seed.own.noted, len(seed.loop.of("fault"))) == ({}, 1)
    seed.own.services = replace(seed.own.services, wrapping=Wrapping(seed.loop.net, Two()))
    seed.own.fault(key, "of two")
    assert (seed.own.noted, len(seed.loop.of("fault"))) == ({key: ["of two"]}, 1)


def test_the_lineage_is_the_digest_of_all_moves_told() -> None:
    seed = Seed("EMBARGOED", embargo=0.01)
    seed.loop.step(4)
    expected = 0
    for event in seed.loop.of("stage"):
        expected = digest(f"{expected} {event.step} {event.data['seed']} {event.data['target']}")
    assert seed.own.lineage == expected
