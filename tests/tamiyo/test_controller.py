"""Tamiyo as a whole: decisions within the budget, explained, and learned from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from esper.config import load_config
from esper.contracts import Decision, HealthReport, Outcome, Site
from esper.tamiyo.controller import RemainingBudget, Tamiyo

SITES = [Site("a", "pair", "a", "a", (), 4, 1, 10, 200), Site("b", "pair", "b", "b", (), 4, 2, 40, 20)]
REPORTS = {"a": HealthReport("a", 1.0, 64), "b": HealthReport("b", 1.0, 64)}
ROOM = RemainingBudget(size=1000, parameters=3000, events=4, model_flops=None)


def tamiyo(events: int = 4, **config: Any) -> Tamiyo:
    return Tamiyo(load_config({"budget": {"growth_events": events}, **config}), 1000, 100)


def decide(
    who: Tamiyo,
    room: RemainingBudget = ROOM,
    reports: Any = REPORTS,
    only: str | None = None,
    step: int = 100,
) -> Decision:
    return who.decide(step, "scheduled", SITES, reports, room, np.random.default_rng(0), only)


def outcome(decision: Decision, kept: bool, gain: float | None = 0.1) -> Outcome:
    assert decision.site is not None
    return Outcome(decision.id, decision.site, kept, gain, 10 * decision.width * kept, 1, 1, "")


def test_a_decision_names_site_width_start_and_says_why() -> None:
    made = decide(tamiyo())
    assert (made.action, made.site, made.id, made.step) == ("widen", "a", 1, 100)
    assert made.start in {"mixed", "svd", "random"}
    assert made.reason.startswith("scheduled; a promises most for its share of the budget among 2 sites")
    assert {arm["site"] for arm in made.arms} == {"a", "b"}
    assert made.propensity == 1.0
    site = next(site for site in SITES if site.name == "a")
    assert made.predicted == REPORTS["a"].improvement / site.unit_flops
    json.dumps(made.arms)


def test_even_shares_grow_the_model_by_the_same_factor_and_end_within_the_budget() -> None:
    who, size, left, factors = tamiyo(widths={"shares": [1.0]}), 1000, 3000, []
    for events in (4, 3, 2, 1):
        who.trigger.due = who.trigger.due[1:]  # as the trigger does when it calls a decision
        made = decide(who, RemainingBudget(size, left, events, None), only="a")
        added = 10 * made.width
        factors.append(added / size)
        size, left = size + added, left - added
        who.learn(outcome(made, True), 100)
    assert left >= 0
    assert size > 3800
    assert max(factors) - min(factors) < 0.05
    assert np.mean(factors) == pytest.approx(4 ** (1 / 4) - 1, abs=0.02)


@pytest.mark.parametrize(
    ("room", "reports", "reason"),
    [
        (RemainingBudget(1000, 3000, 0, None), REPORTS, "the budget is spent"),
        (RemainingBudget(1000, 5, 4, None), REPORTS, "the budget is spent"),
        (RemainingBudget(1000, -5, 4, None), REPORTS, "the budget is spent"),
        (RemainingBudget(1000, 3000, 4, 0.0), REPORTS, "the budget is spent"),
        (ROOM, {}, "no site promises an improvement"),
        (ROOM, {"a": HealthReport("a", None, 0)}, "no site promises an improvement"),
        (ROOM, {"a": HealthReport("a", 0.0, 8)}, "no site promises an improvement"),
    ],
)
def test_doing_nothing_is_a_decision_with_a_reason(room: RemainingBudget, reports: Any, reason: str) -> None:
    who = tamiyo()
    made = decide(who, room, reports)
    assert (made.action, made.site, made.width, made.predicted) == ("nothing", None, 0, None)
    assert made.reason == f"scheduled; {reason}"
    assert not who.pending


def test_the_forward_cost_limits_the_width_and_the_choice() -> None:
    made = decide(tamiyo(), RemainingBudget(1000, 3000, 1, 420.0))
    assert all(arm["width"] <= 2 for arm in made.arms if arm["site"] == "a")
    assert made.site == "b", "a unit of a takes half of the forward FLOPs that are left"
    assert made.width % 2 == 0


def test_a_site_the_user_asked_for_is_the_only_one_considered() -> None:
    made = decide(tamiyo(), only="b")
    assert {arm["site"] for arm in made.arms} == {"b"}
    assert made.site == "b"


def test_after_refusals_in_a_row_growth_rests_and_one_success_forgives() -> None:
    who = tamiyo(schedule={"patience": 2, "plateau": False})
    for kept in (False, True, False):
        who.learn(outcome(decide(who), kept), 100)
    who.trigger.due = [150]
    assert who.due(150, 1.0) == "scheduled"
    who.learn(outcome(decide(who), False), 160)
    who.trigger.due = [200]
    assert who.due(200, 1.0) is None


def test_rewards_are_gains_per_parameter_relative_to_the_best_and_failures_are_worth_nothing() -> None:
    who = tamiyo()
    learned: list[float] = []
    bandit = who.selector.bandit
    bandit.learn = lambda arm, told, reward: learned.append(reward)  # type: ignore[method-assign]
    for kept, gain in ((True, 0.4), (True, 0.1), (False, 0.9), (True, -0.1), (True, None)):
        made = decide(who)
        who.learn(Outcome(made.id, "a", kept, gain, 100 * kept, 1, 1, ""), 100)
    assert learned == pytest.approx([1.0, 0.25, 0.0, 0.0, 0.0])


def test_a_resumed_tamiyo_decides_and_learns_alike() -> None:
    who, other = tamiyo(), tamiyo()
    who.learn(outcome(decide(who), True), 100)
    waiting = decide(who)
    other.load_state_dict(json.loads(json.dumps(who.state_dict())))
    for each in (who, other):
        each.learn(outcome(waiting, False), 120)
    assert other.state_dict() == who.state_dict()
    assert decide(other) == decide(who)
