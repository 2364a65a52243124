"""Races on small hosts see everything; on large ones samples, within a share of the training beside them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esper.config import Race
from esper.contracts import Site
from esper.kasmina.race.schedule import FIELD, LARGE, LEAST, RHYTHM, SHARE, RaceSchedule, StepCost, first


def site(unit_flops: int) -> Site:
    return Site("a>b", "pair", "a", "b", (), 8, 1, 10, unit_flops)


@pytest.mark.parametrize("steps", [8, 62, 200])
def test_a_small_host_is_raced_with_whole_batches_at_every_step(steps: int) -> None:
    plan = RaceSchedule.of(Race(), steps, StepCost(1000, 64), site(10), 4)
    assert (plan.every, plan.examples, plan.rhythm) == (1, None, 0)
    assert plan.halvings == {max(steps // 16, 1), steps // 8, steps // 4}
    assert {plan.kind(age) for age in range(1, steps + 1)} == {"shadow"}


def test_what_the_user_says_holds_for_every_host() -> None:
    plan = RaceSchedule.of(Race(shadow_every=4), 100, StepCost(10**9, 64), site(10), 4)
    assert [plan.kind(age) for age in range(1, 9)] == ["tap"] * 3 + ["shadow"] + ["tap"] * 3 + ["shadow"]
    assert (plan.examples, plan.tapped) == (None, None)


@given(
    flops=st.integers(10**7, 10**11),
    examples=st.integers(32, 512),
    steps=st.integers(60, 200),
    share=st.floats(0.001, 0.5),
)
def test_lessons_of_a_large_host_stay_within_their_share(
    flops: int, examples: int, steps: int, share: float
) -> None:
    step, units = StepCost(flops, examples), 8
    assert 3 * flops * examples >= LARGE or not step.large(Race())
    if not step.large(Race()):
        return
    unit = max(int(share * flops / units), 1)
    plan = RaceSchedule.of(Race(), steps, step, site(unit), units)
    kinds = [plan.kind(age) for age in range(1, steps + 1)]
    assert plan.examples is not None
    allowed = SHARE * steps * 3 * flops * examples
    shadows = (kinds.count("shadow") + FIELD) * plan.examples * (2 * flops + 3 * units * unit)
    least = (FIELD + 1) * LEAST * (2 * flops + 3 * units * unit)  # one lesson there always is
    assert shadows <= max(2 * allowed, least)
    if plan.rhythm:
        assert plan.rhythm == RHYTHM
        assert plan.tapped is not None
        assert kinds.count("tap") * plan.tapped * 3 * units * unit <= allowed
    assert len(plan.halvings) == 2


def test_a_sample_is_the_first_examples_of_what_has_examples() -> None:
    batch = {"x": torch.arange(12).reshape(6, 2), "scale": torch.tensor(2.0), "name": "a"}
    few = first(batch, 4)
    assert few["x"].tolist() == batch["x"][:4].tolist()  # type: ignore[index]
    assert (few["scale"], few["name"]) == (batch["scale"], "a")
    assert first(batch, None) is batch
