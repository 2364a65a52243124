"""Where and what: the arms, their order, and what experience does to it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import HealthReport, Site
from esper.tamiyo.bandits.ucb import UCB
from esper.tamiyo.features import NAMES, Moment
from esper.tamiyo.selector import OFF_SHARE, STARTS, Arm, SeedSelector, fitted

NOW = Moment(budget_left=1.0, stalled=0.0)
SHARES = (0.5, 1.0, 2.0)


def site(name: str, granularity: int = 1, kind: str = "pair") -> Site:
    return Site(name, kind, name, name, (), 4, granularity, 10, 20)


def report(name: str, improvement: float | None) -> HealthReport:
    return HealthReport(name, improvement, 64)


def arms(
    improvements: dict[str, float | None], selector: SeedSelector | None = None, **given: Any
) -> list[Arm]:
    selector = selector or SeedSelector(UCB(), SHARES)
    names = list(improvements)
    costs, units, room = (
        {n: given.get(key, default) for n in names}
        for key, default in (("cost", 0.1), ("units", 8.0), ("room", 100))
    )
    sites = [site(n, given.get("granularity", 1), given.get("kind", "pair")) for n in names]
    return selector.arms(sites, {n: report(n, v) for n, v in improvements.items()}, costs, units, room, NOW)


def test_every_width_and_start_of_every_site_is_an_arm() -> None:
    made = arms({"a": 1.0, "b": 0.5})
    assert {(a.site, a.width, a.start) for a in made} == {
        (s, w, t) for s in "ab" for w in (4, 8, 16) for t in STARTS
    }


def test_priors_follow_improvement_then_width_then_start() -> None:
    priors = {(a.site, a.width, a.start): a.prior for a in arms({"a": 1.0, "b": 0.5})}
    assert priors["a", 8, "mixed"] == 1.0
    assert priors["b", 8, "mixed"] == 0.5
    assert priors["a", 4, "mixed"] == priors["a", 16, "mixed"] == OFF_SHARE
    assert 0 < priors["a", 8, "random"] == STARTS["random"] < priors["a", 8, "svd"] < 1


def test_where_all_fails_the_even_width_is_left_for_its_neighbours_before_random_starts() -> None:
    selector, tried = SeedSelector(UCB(), SHARES), []
    for _ in range(4):
        arm, _ = selector.choose(arms({"a": 1.0}, selector), np.random.default_rng(0))
        selector.learn(arm, kept=False, reward=0.0)
        tried.append((arm.share, arm.start))
    assert tried == [(1.0, "mixed"), (1.0, "svd"), (0.5, "mixed"), (2.0, "mixed")]


def test_a_blueprint_s_units_are_drawn_at_random_and_lose_no_worth_by_it() -> None:
    made = {(a.width, a.start): a.prior for a in arms({"a": 1.0}, kind="module")}
    assert made == {(8, "random"): 1.0, (4, "random"): OFF_SHARE, (16, "random"): OFF_SHARE}


def test_an_arm_tells_the_bandit_what_is_known_of_it_and_of_the_moment() -> None:
    told = SeedSelector(UCB(), SHARES).arms(
        [site("a"), site("b", kind="module")],
        {"a": HealthReport("a", 1.0, 64, dead=0.25, gradient_norm=4.0), "b": HealthReport("b", 0.5, 64)},
        {"a": 0.1, "b": 0.1},
        {"a": 8.0, "b": 8.0},
        {"a": 100, "b": 100},
        Moment(budget_left=0.5, stalled=1.0),
    )
    rows = {(arm.site, arm.width, arm.start): dict(zip(NAMES, arm.features, strict=True)) for arm in told}
    assert rows["a", 16, "svd"] == {
        "prior": pytest.approx(STARTS["svd"] * OFF_SHARE),
        "pair": 1.0,
        "depth": -1.0,
        "width": -3 / 5,  # 4 units
        "cost": 0.0,
        "gradient": 0.0,  # the only one, so the median's
        "dead": 0.25,
        "budget": 0.5,
        "stalled": 1.0,
        "share": 1.0,
        "directed": 1.0,
    }
    other = rows["b", 8, "random"]
    assert (other["pair"], other["depth"], other["gradient"], other["directed"]) == (0.0, 1.0, 0.0, 0.0)


def test_improvement_counts_per_share_of_the_budget() -> None:
    selector = SeedSelector(UCB(), SHARES)
    reports = {"cheap": report("cheap", 1.0), "dear": report("dear", 2.0)}
    both = [site("cheap"), site("dear")]
    made = selector.arms(
        both,
        reports,
        {"cheap": 0.1, "dear": 0.4},
        dict.fromkeys(reports, 2.0),
        dict.fromkeys(reports, 9),
        NOW,
    )
    assert selector.choose(made, np.random.default_rng(0))[0].site == "cheap"


@pytest.mark.parametrize("unknown", [None, float("nan")])
def test_an_unknown_improvement_blocks_the_site_and_no_other(unknown: float | None) -> None:
    assert {a.site for a in arms({"a": unknown, "b": 0.1})} == {"b"}
    assert arms({"a": unknown}) == []
    costs, units, room = {"b": 0.1}, {"b": 8.0}, {"b": 100}  # and so does no report at all
    made = SeedSelector(UCB(), SHARES).arms(
        [site("a"), site("b")], {"b": report("b", 1.0)}, costs, units, room, NOW
    )
    assert {a.site for a in made} == {"b"}


def test_without_improvement_or_room_there_is_no_arm() -> None:
    assert arms({"a": 0.0, "b": 0.0}) == []
    assert arms({"a": 1.0}, room=0) == []
    assert arms({"a": 1.0}, room=3, granularity=4) == []
    assert {a.width for a in arms({"a": 1.0}, room=4, granularity=4)} == {4}


def test_widths_that_come_to_the_same_are_one_arm_with_the_share_nearest_to_one() -> None:
    made = [a for a in arms({"a": 1.0}, units=1.0) if a.start == "svd"]
    assert sorted((a.width, a.share) for a in made) == [(1, 1.0), (2, 2.0)]


def test_a_site_that_failed_falls_behind_one_that_was_kept() -> None:
    selector = SeedSelector(UCB(), SHARES)
    first = arms({"a": 1.0, "b": 0.9}, selector)
    chosen, propensity = selector.choose(first, np.random.default_rng(0))
    assert (chosen.site, chosen.width, chosen.start, propensity) == ("a", 8, "mixed", 1.0)
    assert selector.experience("a") == 1.0
    selector.learn(chosen, kept=False, reward=0.25)
    assert selector.experience("a") == 0.5
    assert selector.bandit.state_dict() == {"arms": [[["a", 1.0, "mixed"], 1, 0.25]]}
    again, _ = selector.choose(arms({"a": 1.0, "b": 0.9}, selector), np.random.default_rng(0))
    assert again.site == "b"
    selector.learn(again, kept=True, reward=1.0)
    assert selector.experience("b") == 1.0
    selector.learn(again, kept=False, reward=0.0)
    assert selector.experience("b") == 2 / 3
    scores = {a.site: a.score for a in arms({"a": 1.0, "b": 0.9}, selector)}
    assert scores == pytest.approx({"a": 1.0 / 0.1 / 2, "b": 0.9 / 0.1 * 2 / 3})


def test_what_was_learned_survives_json() -> None:
    selector, other = (SeedSelector(UCB(), SHARES) for _ in range(2))
    for kept in (True, False, True):
        selector.learn(
            selector.choose(arms({"a": 1.0, "b": 0.9}, selector), np.random.default_rng(0))[0],
            kept,
            kept * 0.7,
        )
    other.load_state_dict(json.loads(json.dumps(selector.state_dict())))
    assert arms({"a": 1.0, "b": 0.9}, other) == arms({"a": 1.0, "b": 0.9}, selector)
    assert other.state_dict() == selector.state_dict()


@given(st.floats(0, 1000), st.integers(1, 8), st.integers(8, 500))
def test_widths_are_whole_groups_within_the_room(units: float, granularity: int, room: int) -> None:
    width = fitted(units, granularity, room)
    assert width % granularity == 0
    assert granularity <= width <= room
    assert abs(width - units) <= granularity or width in {granularity, room // granularity * granularity}
