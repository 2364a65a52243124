"""Which places may grow: p-values at the threshold, alone, all together, and ruled by one number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from torch import nn

import esper
from esper.blueprints.kernel import LiveKernel
from esper.contracts import HealthReport
from esper.kasmina.evidence.efficient import Move
from esper.kasmina.evidence.score import Scored
from esper.kasmina.evidence.significance import p_value
from esper.tolaria.growth.early.verdicts import joint, looked_at
from esper.tolaria.growth.evidence.evidence import Found
from esper.tolaria.growth.run.account import Looked

A, B, C = "0>2", "2>4", "4>6"
EVEN = np.array([1.0, 1.0, -1.0, -1.0] * 30)  # its p-value is one half
CHANCE = "the held-out gain may be chance"


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 8)
    )


HOST = net()
PLACES = esper.wrap(HOST, torch.zeros(2, 8)).places


def some(mean: float, seed: int = 0) -> np.ndarray:
    """120 gains with exactly this mean, in units of their spread."""
    found = np.random.default_rng(seed).normal(size=120)
    return (found - found.mean()) / found.std() + mean


def scored(values: Sequence[float] | np.ndarray, moves: bool = True) -> Scored:
    move = Move(torch.zeros(1, 1), torch.zeros(1, 1))
    given = (move,) if moves else ()
    return Scored(HealthReport("", None, 1), LiveKernel(), {}, given, np.asarray(values, dtype=float))


def found(
    values: Mapping[str, Sequence[float] | np.ndarray],
    failed: Mapping[str, str] | None = None,
    independent: bool = True,
    moves: bool = True,
) -> Found:
    held = {name: scored(one, moves) for name, one in values.items()}
    return Found(held, 1.0, 120, independent, 0, failed or {})


def look(
    one: Found, share: float, groups: Sequence[frozenset[str]] = (), names: Sequence[str] | None = None
) -> dict[str, Looked]:
    units = dict.fromkeys(one.scored if names is None else names, 1)
    return {told.site: told for told in looked_at(one, PLACES, units, share, HOST, groups)}


def p(values: np.ndarray) -> float:
    known = p_value(values)
    assert known is not None
    return known


def test_one_place_may_spend_all_and_passes_at_what_it_may_spend() -> None:
    values = some(0.2)
    exact = p(values)
    assert 1e-4 < exact < 0.2
    passed = look(found({A: values}), exact)[A]
    assert (passed.p_value, passed.threshold, passed.reason, passed.together) == (exact, exact, "", None)
    assert passed.gain == pytest.approx(0.1)  # half of the mean
    refused = look(found({A: values}), math.nextafter(exact, 0))[A]
    assert (refused.p_value, refused.reason, refused.together) == (exact, CHANCE, None)


@pytest.mark.parametrize(("names", "threshold"), [((A,), 0.06), ((A, B), 0.015), ((A, B, C), 0.01)])
def test_half_of_the_share_is_divided_among_the_places(names: Sequence[str], threshold: float) -> None:
    told = look(found(dict.fromkeys(names, EVEN)), 0.06)
    assert list(told) == list(names)
    assert [one.threshold for one in told.values()] == pytest.approx([threshold] * len(names))
    assert all(one.reason == CHANCE for one in told.values())


def test_what_a_unit_costs_is_told() -> None:
    """Into one unit of 0>2 lead 8 weights and a bias, and 3 lead out: 12 parameters, 2 · 11 FLOPs."""
    units = {A: 1, B: 2}
    first, second = looked_at(found({A: EVEN, B: EVEN}), PLACES, units, 0.1, HOST)
    assert (first.width, first.units, first.parameters, first.flops, first.grown) == (2, 1, 12, 22, 0)
    assert (second.width, second.units, second.parameters, second.flops) == (3, 2, 14, 24)


def test_all_together_carry_what_does_not_speak_against_it() -> None:
    """Half of the share is theirs, and they pass at it; p of one half goes with them, more does not."""
    strong, against = some(0.4), some(-0.01, 1)
    together = p(strong / strong.std() + EVEN / EVEN.std() + against / against.std())
    assert p(EVEN) == 0.5
    assert p(against) > 0.5
    evidence = found({A: strong, B: EVEN, C: against}, moves=False)
    told = look(evidence, 2 * together)
    assert joint(evidence, dict.fromkeys((A, B, C), 1)) == together
    assert (told[B].reason, told[B].together) == ("", together)
    assert (told[C].reason, told[C].together) == (CHANCE, None)
    assert p(strong) <= together / 3  # which passes alone
    assert (told[A].reason, told[A].together) == ("", None)
    less = look(evidence, math.nextafter(2 * together, 0))
    assert [one.reason for one in less.values()] == ["", CHANCE, CHANCE]
    assert [one.together for one in less.values()] == [None] * 3


def test_what_passes_alone_is_not_said_to_be_carried() -> None:
    strong, weak = some(1.0), some(0.1, 1)
    told = look(found({A: strong, B: weak}), 0.05)
    assert p(strong) <= 0.0125 < p(weak)
    assert (told[A].reason, told[A].together) == ("", None)
    assert told[B].reason == ""
    assert told[B].together == p(strong / strong.std() + weak / weak.std())
    exact = look(found({A: strong, B: weak}), 4 * p(weak))
    assert (exact[B].threshold, exact[B].reason, exact[B].together) == (p(weak), "", None)


def test_a_gain_that_is_nothing_beside_the_best_is_not_worth_a_unit() -> None:
    """The best is a quarter (half of one half): 1e-5 of it is enough, and less is not."""
    big = np.array([0.25, 0.75] * 64)
    least = np.full(128, 5e-6)
    tiny = least * (1 - 1e-9)
    told = look(found({A: big, B: least, C: tiny}), 0.9)
    assert told[A].gain == 0.25
    assert told[B].gain == 0.25 * 1e-5
    assert "cannot be judged" in told[B].reason  # all alike; but not too small
    assert told[C].reason == "its gain is nothing beside 0.25, the best place's"
    assert told[A].reason == ""


@pytest.mark.parametrize("values", [some(-0.01), some(-3.0)])
def test_a_gain_below_nothing_is_not_compared_with_itself(values: np.ndarray) -> None:
    """The only place is the best one as well: nothing lies beside it."""
    told = look(found({A: values}), 0.9)[A]
    assert told.gain is not None
    assert told.gain < 0
    assert told.reason == "held-out examples speak against it"
    beside = look(found({A: some(1.0), B: values}), 0.9)
    assert (beside[A].reason, beside[B].reason) == ("", "held-out examples speak against it")


def test_a_direction_without_a_length_has_no_gain_and_is_judged_all_the_same() -> None:
    told = look(found({A: some(1.0)}, moves=False), 0.05)[A]
    assert (told.gain, told.reason) == (None, "")
    assert told.p_value == p(some(1.0))


def test_what_was_not_measured_says_why() -> None:
    evidence = found({A: some(1.0), B: []}, failed={C: "ValueError: no"})
    told = look(evidence, 0.05, names=(A, B, C))
    assert told[B].reason == "not passed by these examples"
    assert told[C].reason == "units do not run: ValueError: no"
    assert (told[B].p_value, told[C].p_value, told[B].gain, told[C].gain) == (None,) * 4
    assert told[A].reason == ""
    few = look(found({A: [1.0, 2.0, 3.0]}), 0.05)[A]
    assert few.reason == "3 held-out values cannot be judged: too few, all alike or not finite"
    assert few.p_value is None
    absent = look(found({A: some(1.0)}), 0.05, names=(A, B))
    assert absent[B].reason == "not passed by these examples"
    assert absent[A].reason == ""


# -- places that one number of a config rules --


def test_a_group_may_spend_what_its_members_may_and_passes_at_that() -> None:
    """Neither of the two passes alone; C is not of the group, and stays as it is."""
    first, second, third = some(0.3), some(0.3, 1), some(-3.0, 2)
    together = p(first / first.std() + second / second.std())
    share = 3 * together  # a place: share / 6; two of them: share / 3
    evidence = found({A: first, B: second, C: third}, moves=False)
    group = [frozenset({A, B, "elsewhere"})]
    exact = look(evidence, share, group)
    assert exact[A].threshold == pytest.approx(together / 2)
    assert p(first) > together
    assert [(exact[n].reason, exact[n].together) for n in (A, B)] == [("", together)] * 2
    assert exact[C].reason == CHANCE
    less = look(evidence, share * (1 - 1e-9), group)
    assert [(one.reason, one.together) for one in less.values()] == [(CHANCE, None)] * 3


def test_who_passes_alone_stays_with_a_group_that_does_not() -> None:
    strong, against = some(0.6), some(-3.0, 1)
    told = look(found({A: strong, B: against}, moves=False), 0.05, [frozenset({A, B})])
    assert p(strong) <= 0.0125
    assert told[A].reason == "the config gives 2 places one size, and not all have evidence"
    assert told[B].reason == CHANCE
    assert (told[A].together, told[B].together) == (None, None)


def test_a_group_of_which_all_pass_is_left_as_it_is() -> None:
    told = look(found({A: some(1.0), B: some(1.0, 1)}), 0.05, [frozenset({A, B})])
    assert [(one.reason, one.together) for one in told.values()] == [("", None)] * 2


def test_a_group_with_a_member_that_cannot_be_judged_does_not_pass() -> None:
    strong, alike = some(1.0), np.ones(120)
    other = some(1.0, 1)
    told = look(found({A: strong, B: other, C: alike}), 0.05, [frozenset({A, B, C})])
    assert (
        told[A].reason == told[B].reason == ("the config gives 3 places one size, and not all have evidence")
    )
    assert "cannot be judged" in told[C].reason


# -- all places together --


def test_each_counts_in_its_own_standard_deviations() -> None:
    one, other = some(0.2), 1000 * some(0.1, 1)
    expected = p(one / one.std() + other / other.std())
    assert joint(found({A: one, B: other}), {A: 1, B: 1}) == expected
    assert joint(found({A: one, B: other, C: np.full(120, 7.0)}), {A: 1, B: 1, C: 1}) == expected
    assert joint(found({A: one, B: other, C: some(5.0)[:60]}), {A: 1, B: 1, C: 1}) == expected
    assert joint(found({A: one, B: other, C: some(5.0)}), {A: 1, B: 1}) == expected
    assert joint(found({A: one, B: other}), {A: 1, B: 1, C: 1}) == expected


def test_one_place_is_not_all_together() -> None:
    assert joint(found({A: some(1.0)}), {A: 1}) is None
    assert joint(found({}), {A: 1}) is None
    assert joint(found({A: some(1.0), B: np.ones(120)}), {A: 1, B: 1}) is None


def test_values_of_coupled_examples_are_blocks_already() -> None:
    one, other = some(0.2), some(0.1, 1)
    told = look(found({A: one, B: other}, independent=False), 0.05)
    assert told[A].p_value == p_value(one, blocks=120) != p(one)
