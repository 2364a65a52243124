"""The p-value must be honest about the mean, and the budget must last for any number of looks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ConfigError, ProbeError, StateError
from esper.kasmina.evidence import significance
from esper.kasmina.evidence.significance import (
    Spending,
    block_means,
    log_ratio,
    p_value,
    smallest,
    starts,
    student,
    t_tail,
)

gains = st.lists(st.floats(-100, 100).map(lambda v: round(v, 3)), min_size=8, max_size=80).filter(
    lambda values: len(set(values)) > 1
)


@pytest.mark.parametrize("t", [-3.0, 0.0, 0.7, 4.0])
def test_students_tail_is_the_closed_form(t: float) -> None:
    """Known in closed form: one degree of freedom (Cauchy), two, and three."""
    one = 0.5 - math.atan(t) / math.pi
    two = 0.5 - t / (2 * math.sqrt(2 + t * t))
    u = t / math.sqrt(3)
    three = 0.5 - (u / (1 + u * u) + math.atan(u)) / math.pi
    assert [t_tail(np.array([t]), k)[0] for k in (1, 2, 3)] == pytest.approx([one, two, three], rel=1e-9)


def test_students_tail_is_that_of_the_tables() -> None:
    """t.995 with 10, 31 and 120 degrees of freedom: 3.169, 2.744, 2.617."""
    found = [t_tail(np.array([t]), k)[0] for t, k in ((3.16927, 10), (2.74404, 31), (2.61742, 120))]
    assert found == pytest.approx([0.005] * 3, rel=1e-4)
    assert t_tail(np.array([np.inf]), 9)[0] == significance.FLOOR


def test_students_tail_is_a_probability_however_it_is_rounded() -> None:
    """The finite sum of some degrees of freedom exceeds one by a rounding."""
    t = np.logspace(-2, 12, 400)
    for freedom in (*range(1, 40), 200, 1001):
        below, above = t_tail(-t, freedom), t_tail(t, freedom)
        assert below.max() <= 1.0
        assert above.min() >= significance.FLOOR
        assert below + above == pytest.approx(1.0, abs=1e-11)


def test_the_likelihood_ratio_is_the_closed_form() -> None:
    """n values of 1/M and one of −1: Σ log(1 + λx) is largest at λ = (n − M)/(n + 1)."""
    n, m = 40, 5.0
    best = (n - m) / (n + 1)
    expected = n * math.log1p(best / m) + math.log1p(-best)
    assert log_ratio(np.array([[1 / m] * n + [-1.0]]))[0] == pytest.approx(expected, rel=1e-9)
    assert log_ratio(np.array([[0.1] * 5 + [-1.0]]))[0] == 0.0


def test_blocks_are_contiguous_and_keep_the_mean() -> None:
    values = np.array([[1.0, 3.0, 5.0, 7.0, 10.0, 20.0]])
    np.testing.assert_allclose(block_means(values, starts(6, 3)), [[2.0, 6.0, 15.0]])
    ragged = np.arange(70.0)[None] ** 2
    assert block_means(ragged, starts(70, None)).mean() == pytest.approx(ragged.mean())
    assert [len(starts(n, None)) for n in (8, 15, 63, 64, 255, 256, 1024)] == [8, 15, 9, 8, 31, 16, 32]


def test_every_length_has_the_blocks_that_are_named() -> None:
    """Below 8 values each is a block; then 8 blocks; lengths 8, 16 and 32 from 64, 256 and 1,024 on."""
    ends = {5: 5, 7: 7, 8: 8, 16: 8, 63: 9, 64: 8, 65: 8, 255: 31, 256: 16, 257: 16, 1023: 63, 1024: 32}
    assert {n: len(starts(n, None)) for n in ends} == ends
    assert [len(starts(10, blocks)) for blocks in (0, 1, 2, 3, 10, 11)] == [2, 2, 2, 3, 10, 10]
    assert starts(10, 3).tolist() == [0, 3, 6]
    assert starts(20, None).tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]


def test_students_test_is_the_one_of_the_books() -> None:
    """1, 2, 3, 6: mean 3, spread √(14/3)/2, t = 2.777 with 3 degrees of freedom."""
    t = 3 / math.sqrt(14 / 3 / 4)
    u = t / math.sqrt(3)
    three = 0.5 - (u / (1 + u * u) + math.atan(u)) / math.pi
    assert student(np.array([[1.0, 2.0, 3.0, 6.0]]))[0] == pytest.approx(three, rel=1e-9)
    even = student(np.array([[2.0] * 4, [-2.0] * 4, [0.0] * 4]))
    assert even.tolist() == [significance.FLOOR, 1.0, 0.5]  # certain, certainly not, and nothing at all
    assert student(np.array([[1.0, -1.0, 3.0, -3.0]]))[0] == 0.5


def test_the_unseen_example_is_five_root_mean_squares_or_one_and_a_half_or_the_worst() -> None:
    """Constant gains g: Σ log(1 + λx) over n of 1/u and one of −1, in closed form, u = 5 or 1.5."""
    for n, unseen in ((30, 5.0), (30, 1.5)):
        best = (n - unseen) / (n + 1)
        ratio = n * math.log1p(best / unseen) + math.log1p(-best)
        expected = t_tail(np.array([math.sqrt(n * math.expm1(2 * ratio / (n + 1)))]), n)[0]
        assert significance.likelihood(np.full((1, n), 0.5), unseen)[0] == pytest.approx(expected, rel=1e-6)
    rows = np.array([[1.0] * 99 + [-9.0]])  # root mean square 1.342, five of them 6.7: the worst counts
    grid = np.arange(0, 1, 1e-5)
    ratio = (99 * np.log1p(grid / 9) + 2 * np.log1p(-grid)).max()
    expected = t_tail(np.array([math.sqrt(100 * math.expm1(2 * ratio / 101))]), 100)[0]
    assert significance.likelihood(rows, 5.0)[0] == pytest.approx(expected, rel=1e-4)


def test_means_of_blocks_have_a_smaller_unseen_example() -> None:
    values = np.array([1.0, 1.25] * 10)
    as_blocks, as_examples = p_value(values, blocks=20), p_value(values, blocks=19)
    scaled = values[None] / 1.25
    assert as_blocks == significance.likelihood(scaled, 1.5)[0]
    assert as_examples == significance.likelihood(scaled, 5.0)[0]


def test_a_p_value_is_the_larger_of_its_two_tests() -> None:
    """Blocks of two that cancel: t over the block means is 0, whatever the likelihood says of the values."""
    values = np.array([1.0, -1.0] * 20)
    assert p_value(values, blocks=20) == 0.5
    strong = np.array([1.0, 1.2] * 60)
    t, n, m = np.inf, 120, 5 * math.sqrt((1 + 1.44) / 2)
    assert t_tail(np.array([t]), 14)[0] == significance.FLOOR
    ratio = max(
        60 * math.log1p(u / m) + 60 * math.log1p(1.2 * u / m) + math.log1p(-u) for u in np.arange(0, 1, 1e-4)
    )
    expected = t_tail(np.array([math.sqrt(n * math.expm1(2 * ratio / (n + 1)))]), n)[0]
    assert p_value(strong) == pytest.approx(expected, rel=1e-4)


def test_where_rare_losses_undo_the_gain_the_promise_holds() -> None:
    """N4: a mean of −0.0005 and a bet on the clipped mean passed .29 of the time, where .05 was promised."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return np.where(rng.random(n) < 0.07, -0.14, 0.01) + rng.normal(0, 0.003, n)

    found = [p_value(draw(64)) for _ in range(1000)]
    assert sum(p is not None and p <= 0.05 for p in found) / 1000 <= 0.05
    assert sum(p is not None and p <= 0.05 / 120 for p in [p_value(draw(1500)) for _ in range(400)]) == 0


@pytest.mark.parametrize("size", [1, 4, 8])
def test_copies_of_examples_are_not_more_evidence(size: int) -> None:
    rows = np.random.default_rng(0).normal(size=(4000, 512 // size))
    found = significance.p_values(np.repeat(rows, size, axis=1))
    assert (found <= 0.05).mean() <= 0.05 + 3 * math.sqrt(0.05 / 4000)
    plain = significance.student(np.repeat(rows, size, axis=1))
    assert size == 1 or (plain <= 0.05).mean() > 0.15  # what copies do to a test that does not mind them


def test_a_real_gain_passes() -> None:
    rng = np.random.default_rng(0)
    found = [p_value(rng.normal(size=1024) + 6 / 32) for _ in range(200)]
    assert sum(p is not None and p <= 2e-4 for p in found) / 200 > 0.9


@given(gains, st.integers(-20, 20))
def test_the_unit_of_the_loss_does_not_matter(values: list[float], power: int) -> None:
    assert p_value(np.array(values) * 2.0**power) == p_value(np.array(values))


@given(gains, st.floats(0.01, 100))
def test_a_larger_gain_never_counts_less(values: list[float], more: float) -> None:
    before, after = p_value(np.array(values)), p_value(np.array(values) + more)
    assert before is not None
    assert after is not None
    assert after <= before * (1 + 1e-6)


@given(gains)
def test_no_gain_is_no_evidence(values: list[float]) -> None:
    p = p_value(np.array(values) - np.mean(values))
    assert p is None or p >= 0.49


@pytest.mark.parametrize(
    "values", [[], [1.0] * 7, [1.0, 2.0] * 3, [0.3] * 50, [0.0] * 50, [math.nan, *range(20)]]
)
def test_what_is_not_known_is_none(values: list[float]) -> None:
    assert p_value(np.array(values)) is None


def test_extremes_do_not_overflow() -> None:
    for unit in (1e308, 1e-308):
        p = p_value(np.array([1.0, 0.9, -1.0] * 9) * unit)
        assert p is not None
        assert 0 < p < 1


@pytest.mark.parametrize("alpha", [0.05, 0.01, 2e-4])
@pytest.mark.parametrize("of_blocks", [False, True])
def test_below_the_smallest_probe_nothing_passes_and_from_it_on_something(
    alpha: float, of_blocks: bool
) -> None:
    n = smallest(alpha, of_blocks=of_blocks)
    enough, few = (1 + 1e-6 * np.arange(count) for count in (n, n - 1))
    found = p_value(enough, blocks=n if of_blocks else None)
    assert found is not None
    assert found <= alpha * (1 + 1e-4)
    less = p_value(few, blocks=n - 1 if of_blocks else None)
    assert less is None or less > alpha


def test_the_smallest_probes_are_those_the_documentation_names() -> None:
    assert [smallest(alpha) for alpha in (0.05, 0.01, 0.001, 0.0002)] == [21, 30, 44, 53]
    with pytest.raises(ProbeError, match="no probe can pass"):
        smallest(1e-13)


# -- the budget --


@given(st.floats(1e-4, 0.5), st.lists(st.integers(1, 30), min_size=1, max_size=300))
def test_all_looks_together_spend_at_most_the_budget(budget: float, places: list[int]) -> None:
    spending = Spending(budget)
    total = math.fsum(n * spending.threshold(event, n) for event, n in enumerate(places))
    assert total <= budget * (1 + 1e-12)
    assert spending.spent == pytest.approx(total)
    assert all(spending.share(event) <= spending.most for event in range(len(places)))


def test_the_budget_is_shared_as_is_written() -> None:
    """.02, .03, .07, .16, .26, .26; of the rest, .2: a half, a sixth, a twelfth. Places share evenly."""
    spending = Spending(0.5)
    shares = [0.01, 0.015, 0.035, 0.08, 0.13, 0.13, 0.1 / 2, 0.1 / 6, 0.1 / 12]
    assert [spending.share(event) for event in range(9)] == pytest.approx(shares)
    assert spending.most == pytest.approx(0.13)
    assert spending.threshold(6, 4) == pytest.approx(0.0125)
    assert not spending.paid
    spending.paid = True  # nothing more is given after it: the shares stay
    assert spending.share(0) == pytest.approx(0.01)
    assert spending.threshold(0, 1) == pytest.approx(0.01)


def test_a_state_without_payment_is_one_of_before_it() -> None:
    spending = Spending(0.05, further=0.2)
    spending.load_state_dict({"budget": 0.05, "looks": [[3, 2]]})
    assert not spending.paid
    assert spending.looks == {3: 2}
    assert spending.state_dict() == {"budget": 0.05, "looks": [[3, 2]], "paid": False}


def test_the_smallest_probes_are_found_between_powers() -> None:
    """What passes first, counted up one by one."""

    def first(alpha: float, unseen: float) -> int:
        return next(n for n in range(8, 400) if significance.likelihood(np.ones((1, n)), unseen)[0] <= alpha)

    for alpha in (0.3, 0.05, 1e-3, 1e-6, significance.FLOOR):
        assert smallest(alpha) == first(alpha, 5.0)
        assert smallest(alpha, of_blocks=True) == first(alpha, 1.5)


def test_an_event_is_spent_once() -> None:
    spending = Spending(0.06)
    assert spending.threshold(0, 3) == pytest.approx(0.0004)
    assert spending.threshold(4, 1) == pytest.approx(0.0156)
    assert spending.threshold(0, 3) == pytest.approx(0.0004)  # a replay
    assert spending.spent == pytest.approx(0.0168)
    with pytest.raises(StateError, match="event 0 was tested on 3 places"):
        spending.threshold(0, 2)
    for event, places in ((-1, 1), (2, 0)):
        with pytest.raises(StateError, match="count from 0"):
            spending.threshold(event, places)
    for budget in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="budget"):
            Spending(budget)


def test_what_has_paid_pays_for_what_follows() -> None:
    """That nothing helps is refuted then: each later event has a budget of its own."""
    spending = Spending(0.05, further=0.2)
    assert spending.threshold(0, 1) < 0.05
    spending.paid = True
    assert spending.threshold(1, 4) == spending.threshold(2, 4) == pytest.approx(0.05)
    back = Spending(0.05, further=0.2)
    back.load_state_dict(spending.state_dict())
    assert back.share(3) == pytest.approx(0.2)


def test_a_resumed_run_goes_on_with_what_is_left() -> None:
    before, after, other = Spending(0.05), Spending(0.05), Spending(0.01)
    before.threshold(0, 4)
    before.threshold(2, 2)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
    assert after.spent == before.spent
    with pytest.raises(StateError, match=r"budget of 0\.05, this one 0\.01"):
        other.load_state_dict(before.state_dict())
