"""One trial in numbers worked out by hand: how long stages last, what is worse, what all came to."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from esper.config import Config
from esper.contracts import Outcome
from esper.kasmina.race.exposing import step_kernel, worse
from esper.kasmina.race.lifecycle import outcome_of
from esper.kasmina.race.needs import Services
from esper.kasmina.race.schedule import Timing
from esper.kasmina.race.selection import finite
from esper.kasmina.race.trial import Exposed, Germinated
from tests.kasmina.hosts import Loop

# -- how long stages last --


@pytest.mark.parametrize(
    ("steps", "incubate", "ramp"),
    [
        (40, 8, 4),
        (144, 9, 4),
        (1_250, 78, 5),
        (25_000, 200, 100),
        (10**6, 200, 100),
        (None, 62, 4),
    ],
)
def test_what_is_left_open_is_a_share_of_the_run(steps: int | None, incubate: int, ramp: int) -> None:
    timing = Timing.of(Config(), steps, settling=0)
    assert (timing.incubate, timing.ramp, timing.evaluate) == (incubate, ramp, ramp)
    assert timing.stabilise == ramp // 2
    assert Timing.of(Config(), steps, settling=ramp).stabilise == ramp


@pytest.mark.parametrize(("steps", "embargo"), [(None, 250), (100, 25), (101, 26), (99, 25)])
def test_an_embargo_is_a_share_of_the_run_rounded_up(steps: int | None, embargo: int) -> None:
    given = Config.model_validate({"schedule": {"embargo": 0.25}})
    assert Timing.of(given, steps, settling=0).embargo == embargo


def test_what_is_set_stands() -> None:
    settings = {"race": {"steps": 7}, "blend": {"ramp": 9, "stabilise": 0, "evaluate": 5}}
    timing = Timing.of(Config.model_validate(settings), 25_000, settling=300)
    assert (timing.incubate, timing.ramp, timing.stabilise, timing.evaluate) == (7, 9, 0, 5)


# -- is the loss worse? --


BEFORE = [0.0, 0.0, 0.0, 4.0]  # mean 1, variance 4, so of its mean 1
CALM = [0.0] * 24 + [1.0]  # mean .04, variance .04, so of its mean .0016


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            BEFORE,
            [2.75, 4.25],
            False,
        ),  # variance of the mean .5625: the limit is 1 + 2 √1.5625 = 3.5, reached
        (BEFORE, [2.75 + 2**-6, 4.25 + 2**-6], True),  # and passed
        (CALM, [0.445], False),  # one loss is as uncertain as one before: .04 + 2 √(.0016 + .04) = .44792
        (CALM, [0.45], True),
        (BEFORE, [4.0], False),  # no higher than one before, and below 1 + 2 √5
        (BEFORE, [5.0], True),  # higher than any before, though below it too
        ([1.0, 1.0], [1.5], True),  # two suffice
        ([1.0], [5.0], False),  # one tells no spread
        (BEFORE, [], False),
        (BEFORE, [math.nan, 1.0], True),
    ],
)
def test_worse_is_more_than_two_standard_errors(
    before: list[float], after: list[float], expected: bool
) -> None:
    assert worse(before, after) is expected


def test_json_has_only_finite_numbers() -> None:
    assert [finite(value) for value in (0.0, -2.5, math.nan, math.inf, -math.inf)] == [0.0, -2.5] + [None] * 3


# -- an exposed kernel --


class Scaled:
    """AMP's scale."""

    def __init__(self, by: float) -> None:
        self.by = by

    def get_scale(self) -> float:
        return self.by


def exposed(by: float = 1.0) -> tuple[Loop, Exposed, Services]:
    """Return a trial whose kernel is exposed, gradients of ones times the scale, and plain descent at .5."""
    blend = {"ramp": 2, "stabilise": 60, "evaluate": 60}
    config = {"schedule": {"warmup": 0.01}, "race": {"steps": 8}, "blend": blend}
    loop = Loop("mlp", config=config).until("STABILISING")
    orchestrator = loop.growth.run.orchestrator  # type: ignore[union-attr]
    trial: Any = orchestrator.oldest
    trial = replace(trial, optimizer=torch.optim.SGD(trial.kernel.parameters(), lr=0.5))
    for parameter in trial.kernel.parameters():
        parameter.grad = torch.full_like(parameter, by)
    return loop, trial, replace(orchestrator.services, scaler=Scaled(by))


def held(trial: Exposed) -> torch.Tensor:
    return nn.utils.parameters_to_vector(trial.kernel.parameters()).detach().clone()


@pytest.mark.parametrize("by", [1.0, 2.0, 1024.0])
def test_a_kernel_steps_along_its_unscaled_gradient_of_norm_one_at_most(by: float) -> None:
    _, trial, given = exposed(by)
    before = held(trial)
    root = math.sqrt(len(before))
    assert step_kernel(trial, given) == pytest.approx(root)  # of ones
    torch.testing.assert_close(held(trial), before - 0.5 / root)
    assert all(parameter.grad is None for parameter in trial.kernel.parameters())


def test_a_small_gradient_is_not_made_larger() -> None:
    _, trial, given = exposed()
    before = held(trial)
    for parameter in trial.kernel.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    assert step_kernel(trial, given) == pytest.approx(1e-3 * math.sqrt(len(before)))
    torch.testing.assert_close(held(trial), before - 0.5e-3)


def test_a_parameter_without_gradient_is_passed_over() -> None:
    _, trial, given = exposed(2.0)
    first, *others = trial.kernel.parameters()
    first.grad = None
    stays = first.detach().clone()
    assert step_kernel(trial, given) == pytest.approx(math.sqrt(sum(p.numel() for p in others)))
    assert torch.equal(first.detach(), stays)


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_forgotten() -> None:
    _, trial, given = exposed()
    before = held(trial)
    first = next(trial.kernel.parameters())
    first.grad = torch.full_like(first, math.nan)
    assert math.isnan(step_kernel(trial, given))
    assert torch.equal(held(trial), before)
    assert all(parameter.grad is None for parameter in trial.kernel.parameters())


def test_a_kernel_steps_at_the_rate_its_layer_has_by_then() -> None:
    loop, trial, given = exposed()
    trial = replace(trial, optimizer=given.donor.like(trial.kernel, trial.origin.layer.place))
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0  # as a scheduler does at its end
    before = held(trial)
    step_kernel(trial, given)
    assert torch.equal(held(trial), before)


# -- what came of it --


def test_what_a_trial_came_to_is_counted_from_its_beginning() -> None:
    loop, trial, given = exposed()
    model = loop.growth.run.morphable  # type: ignore[union-attr]
    baseline, spent = trial.origin.baseline, given.ledger.growth_flops
    baseline.parameters, baseline.flops = model.parameter_count() - 7, model.flops - 11
    baseline.spent = spent - 13
    facts = trial.origin.decision.id, trial.origin.layer.place.site.name
    gain = trial.verdict.gain
    assert gain is not None
    assert gain > 0
    assert outcome_of(trial, model, spent, True, "kept") == Outcome(*facts, True, gain, 7, 11, 13, "kept")
    assert outcome_of(trial, model, spent, False, "why") == Outcome(*facts, False, gain, 0, 0, 13, "why")
    begun = Germinated(trial.origin, trial.started)
    assert outcome_of(begun, model, spent, False, "w") == Outcome(*facts, False, None, 0, 0, 13, "w")


def test_a_layer_that_the_user_has_replaced_is_named() -> None:
    loop, trial, _ = exposed()
    assert trial.origin.lost(loop.net) == ""
    name = trial.origin.layer.place.site.entry
    setattr(loop.net, name, nn.Linear(10, 3))
    assert trial.origin.lost(loop.net) == f"{name} was replaced or removed since esper.grow"
