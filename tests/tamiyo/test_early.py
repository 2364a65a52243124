"""Events fall where learning is still to come, and no event spends more than the budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from esper.contracts import Site
from esper.tamiyo.controller import RemainingBudget
from esper.tamiyo.early import allocate, bisect, due, wanted

SHARES = (0.1, 0.3, 0.5, 0.7)
BIG = 10**12


def site(name: str, width: int, granularity: int = 1, most: int | None = None) -> Site:
    return Site(name, "pair", "in", "out", (), width, granularity, 10, 20, most=most)


def cosine(steps: int) -> list[float]:
    return [0.5 * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]


def one_cycle(steps: int) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = OneCycleLR(optimizer, 0.1, total_steps=steps + 1)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# -- when ------------------------------------------------------------------------------------------------


def test_under_a_constant_rate_no_event_waits_longer_than_three_quarters_of_its_share() -> None:
    assert due(SHARES, [0.1] * 1000, 1000) == [75, 225, 375, 525]


def test_a_warm_up_is_no_reason_to_wait() -> None:
    assert due((0.07, 0.2, 0.4, 0.6), one_cycle(1000), 1000)[:2] == [53, 150]


def test_under_a_cosine_events_come_early() -> None:
    assert due(SHARES, cosine(1000), 1000) == pytest.approx([50, 152, 264, 394], abs=15)


def test_a_rate_that_is_not_known_is_taken_for_a_cosine() -> None:
    assert due(SHARES, None, 1000) == pytest.approx(due(SHARES, cosine(1000), 1000), abs=1)


def test_where_the_rate_is_gone_nothing_is_born() -> None:
    found = due(SHARES, one_cycle(1000), 1000)
    assert found == sorted(found)
    assert found[-1] < 550


def test_after_a_step_that_ends_the_rate_nothing_is_born() -> None:
    assert due(SHARES, [1.0] * 200 + [1e-4] * 800, 1000)[-1] < 200


def test_where_no_step_learns_there_is_no_event() -> None:
    assert due(SHARES, [0.0] * 10, 10) == []


@given(
    st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=6),
    st.lists(st.floats(0, 10), min_size=1, max_size=300),
)
def test_events_are_inside_the_run_in_order_and_never_twice(shares: list[float], rates: list[float]) -> None:
    found = due(sorted(shares), rates, len(rates))
    assert found == sorted(set(found))
    assert len(found) <= len(shares)
    assert all(1 <= step <= len(rates) for step in found)
    assert bool(found) == (sum(rates) > 0)


@given(
    st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6, unique=True),
    st.lists(st.floats(0.01, 10), min_size=2, max_size=300),
)
def test_an_event_is_the_first_step_that_has_done_its_share_or_earlier(
    shares: list[float], rates: list[float]
) -> None:
    total, steps = list(itertools.accumulate(rates))[-1], len(rates)
    expected = set()
    for share in shares:
        learned = itertools.accumulate(rates)
        first = 1 + next(i for i, done in enumerate(learned) if done >= share * total)
        expected.add(max(min(first, round(0.75 * share * steps)), 1))
    assert due(sorted(shares), rates, steps) == sorted(expected)


@given(
    st.permutations([0.07, 0.2, 0.4, 0.6]),
    st.sampled_from([None, [1.0] * 100, cosine(100)]),
)
def test_the_order_in_which_shares_are_given_does_not_matter(
    shares: list[float], rates: list[float] | None
) -> None:
    assert due(shares, rates, 100) == due(sorted(shares), rates, 100)


# -- how many --------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 32), st.floats(1.01, 4), st.one_of(st.none(), st.integers(1, 4)))
def test_units_are_whole_groups_and_at_least_one(
    width: int, group: int, factor: float, groups: int | None
) -> None:
    most = None if groups is None else groups * group
    units = wanted(site("a", width, group, most), factor)
    assert units >= group
    assert units % group == 0
    assert most is None or units <= most
    if most is None and units > group:
        assert abs(width + units - width * factor) <= group / 2 + 1e-6


def matrices(widths: Mapping[str, int], inputs: int = 7) -> Callable[[Mapping[str, int]], tuple[int, int]]:
    """Cost of a chain of layers: neighbours that both grow have more weights between them."""

    def size(sizes: list[int]) -> int:
        return sum(a * b for a, b in itertools.pairwise([inputs, *sizes, inputs]))

    def cost(units: Mapping[str, int]) -> tuple[int, int]:
        before = list(widths.values())
        added = size([w + units.get(n, 0) for n, w in widths.items()]) - size(before)
        return added, 2 * added

    return cost


chains = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 4), st.one_of(st.none(), st.integers(1, 3))),
    min_size=1,
    max_size=5,
)


@given(chains, st.floats(1.1, 4), st.integers(1, 5), st.integers(0, 20_000), st.integers(0, 20_000))
def test_an_event_never_costs_more_than_is_left(
    chain: list[tuple[int, int, int | None]], most: float, left: int, parameters: int, flops: int
) -> None:
    sites = [
        site(str(i), width * group, group, None if groups is None else groups * group)
        for i, (width, group, groups) in enumerate(chain)
    ]
    cost = matrices({s.name: s.width for s in sites})
    for cap in (None, flops):
        units = allocate(sites, most, left, RemainingBudget(100, parameters, left, cap), cost)
        spent, computed = cost(units)
        assert spent <= parameters
        assert cap is None or computed <= cap
        for one in sites:
            given_ = units.get(one.name, one.granularity)
            assert given_ > 0
            assert given_ % one.granularity == 0
            assert one.most is None or given_ <= one.most
            assert given_ <= wanted(one, most)


@given(st.integers(4, 60), st.integers(1, 4), st.integers(500, 30_000))
def test_the_events_to_come_spend_the_budget_between_them(width: int, left: int, parameters: int) -> None:
    widths = {"a": width, "b": width}
    room, start = parameters, dict(widths)
    for event in range(left, 0, -1):
        cost = matrices(widths)
        units = allocate(
            [site(n, w) for n, w in widths.items()], 2.0, event, RemainingBudget(0, room, event, None), cost
        )
        room -= cost(units)[0]
        widths = {n: w + units.get(n, 0) for n, w in widths.items()}
    assert room >= 0
    doubled = all(widths[n] >= start[n] * 2**left for n in widths)
    one_more = matrices(widths)(dict.fromkeys(widths, 1))[0]
    assert doubled or room <= 2 * one_more, (room, one_more)


def test_a_budget_that_is_spread_over_more_events_gives_the_first_one_less() -> None:
    widths = {"a": 16, "b": 16}
    sites = [site(n, w) for n, w in widths.items()]
    sizes = [
        sum(allocate(sites, 2.0, left, RemainingBudget(0, 1500, left, None), matrices(widths)).values())
        for left in (1, 2, 3)
    ]
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_forward_flops_are_a_cap_of_their_own() -> None:
    cost = matrices({"a": 16})
    free = allocate([site("a", 16)], 2.0, 1, RemainingBudget(0, BIG, 1, None), cost)
    capped = allocate([site("a", 16)], 2.0, 1, RemainingBudget(0, BIG, 1, cost({"a": 5})[1]), cost)
    assert free == {"a": 16}
    assert capped == {"a": 5}


def test_a_place_whose_group_is_too_dear_takes_nothing_from_the_others() -> None:
    sites = [site("groups", 32, 8), site("single", 32)]
    cost = matrices({"groups": 32, "single": 32})
    assert allocate(sites, 2.0, 1, RemainingBudget(0, cost({"single": 4})[0], 1, None), cost) == {"single": 4}
    assert allocate(sites, 2.0, 1, RemainingBudget(0, 0, 1, None), cost) == {}
    assert allocate(sites, 2.0, 1, RemainingBudget(0, -5, 1, None), cost) == {}


@given(st.floats(0.001, 0.999))
def test_bisect_finds_the_border_from_below(border: float) -> None:
    found = bisect(0.0, 1.0, lambda value: value <= border)
    assert found <= border
    assert border - found <= 2**-12
