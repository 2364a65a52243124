"""The bet must be fair whatever the data, and win where there is something to win."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from esper.batches.examples import example_losses, join, split_batch
from esper.errors import ProbeError
from esper.kasmina.evidence.e_values import CAP, WORST, e_value, weight_of_evidence
from esper.kasmina.evidence.significance import p_value

magnitudes = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=7)
practice = st.lists(st.floats(-100, 100).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=20)


@given(magnitudes)
def test_expected_wealth_of_a_fair_bet_is_one_where_the_stakes_allow_for_its_losses(
    sizes: list[float],
) -> None:
    """Over all sign patterns of given magnitudes, each as likely as any: an e-value, with equality."""
    rehearsal = np.array([max(sizes), -max(sizes)])
    signs = np.array(list(itertools.product((-1, 1), repeat=len(sizes))))
    values = [e_value(pattern * np.array(sizes), rehearsal) for pattern in signs]
    assert np.mean(values) == pytest.approx(1.0, rel=1e-9)


def test_the_wealth_of_a_bet_by_hand() -> None:
    """The rehearsal has a root mean square of 1: all is risked on a loss of 2; Kelly is .05."""
    rehearsal, stakes = np.array([1.0, -1.0]), np.array([0.05, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8])
    shares = np.array([0.5] + [0.5 / 7] * 7)

    def won(*factors: np.ndarray) -> float:
        return float((shares * np.prod(factors, axis=0)).sum())

    assert e_value(np.array([1.0]), rehearsal) == pytest.approx(won(1 + stakes / 2))
    assert e_value(np.array([1.0, -2.0]), rehearsal) == pytest.approx(won(1 + stakes / 2, 1 - stakes))
    assert e_value(np.array([1e9]), rehearsal) == pytest.approx(won(1 + CAP / WORST * stakes))
    ruined = np.maximum(1 - 2 * stakes, 0)  # stakes of .6 and .8 by a loss of 4
    assert e_value(np.array([-4.0]), rehearsal) == pytest.approx(won(ruined))
    assert e_value(np.array([-4.0, 6.0]), rehearsal) == pytest.approx(won(ruined, 1 + 3 * stakes))
    assert e_value(np.array([-100.0, 6.0, 6.0]), rehearsal) == 0.0
    assert e_value(np.array([6.0]), rehearsal) == pytest.approx(won(1 + 3 * stakes))  # the most that counts
    assert e_value(np.array([6.5]), rehearsal) == e_value(np.array([6.0]), rehearsal)


def test_the_worst_that_was_rehearsed_bounds_the_bet_by_hand() -> None:
    """Seven gains of 1, two losses of 3: the risk is 4.5, above 2 · 5/3; Kelly is 1/9 · 4.5 / (25/9)."""
    rehearsal, stakes = (
        np.array([1.0] * 7 + [-3.0] * 2),
        np.array([0.18, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8]),
    )
    shares = np.array([0.5] + [0.5 / 7] * 7)
    assert e_value(np.array([4.5]), rehearsal) == pytest.approx(float((shares * (1 + stakes)).sum()))
    assert e_value(np.array([-2.25]), rehearsal) == pytest.approx(float((shares * (1 - stakes / 2)).sum()))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), practice, st.integers(-20, 20))
def test_the_unit_of_the_loss_does_not_matter(
    differences: list[float], rehearsal: list[float], power: int
) -> None:
    one = e_value(np.array(differences), np.array(rehearsal))
    other = e_value(np.array(differences) * 2.0**power, np.array(rehearsal) * 2.0**power)
    assert other == pytest.approx(one, rel=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), practice, st.floats(0.01, 5))
def test_a_larger_gain_never_counts_less(
    differences: list[float], rehearsal: list[float], more: float
) -> None:
    worse = e_value(np.array(differences), np.array(rehearsal))
    assert e_value(np.array(differences) + more, np.array(rehearsal)) >= worse * (1 - 1e-9)


NULLS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_t(1.5, size=n),
    "rare gains, common small harm": lambda rng, n: rng.exponential(size=n) - 1,
    "mostly nothing": lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.1),
    "rare losses, common small gain": lambda rng, n: 1 - rng.exponential(size=n),
    "harm": lambda rng, n: rng.normal(size=n) - 0.1,
}


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("p", [0.2, 0.05, 0.01])
def test_under_the_null_one_over_p_is_exceeded_at_most_p_of_the_time(null: str, p: float) -> None:
    """The rehearsal is the most tempting there is: it says the kernel helps."""
    rng = np.random.default_rng(0)
    won = 0
    for _ in range(1000):
        rehearsal = np.abs(rng.normal(size=32)) + rng.normal(size=32)
        won += e_value(NULLS[null](rng, 96), rehearsal) > 1 / p
    assert won / 1000 <= p


def test_a_null_look_after_every_batch_stays_within_the_budget_too() -> None:
    """Always valid: the largest of all looks along the way obeys the same bound (Ville's inequality)."""
    rng = np.random.default_rng(1)
    highest = [
        max(e_value(differences[:n], rehearsal) for n in range(8, 129, 8))
        for differences, rehearsal in ((rng.normal(size=128), rng.normal(size=32)) for _ in range(400))
    ]
    assert np.mean(np.array(highest) > 20) <= 0.05


def test_a_real_gain_wins_and_wins_more_with_more_examples() -> None:
    rng = np.random.default_rng(0)
    rehearsal = rng.normal(0.5, 1, size=64)
    few, many = (
        np.median([e_value(rng.normal(0.5, 1, size=n), rehearsal) for _ in range(50)]) for n in (30, 300)
    )
    assert 1 < few < 1e6 < many


@pytest.mark.parametrize(
    ("differences", "rehearsal"),
    [
        ([], [1.0]),
        ([1.0], []),
        ([1.0], [0.0]),
        ([float("nan")], [1.0]),
        ([float("inf")], [1.0]),
        ([1.0], [float("nan")]),
        ([1.0], [float("inf")]),
    ],
)
def test_what_is_not_known_wins_nothing(differences: list[float], rehearsal: list[float]) -> None:
    assert e_value(np.array(differences), np.array(rehearsal)) == 0.0


def test_one_wild_example_cannot_win_alone() -> None:
    rehearsal = np.ones(10)
    assert e_value(np.array([1e9]), rehearsal) == e_value(np.array([CAP]), rehearsal) <= 1 + CAP / WORST


def test_overwhelming_evidence_does_not_overflow() -> None:
    """It ends at e^700, of which the two largest stakes, .8, hold their shares."""
    won = e_value(np.ones(100_000), np.ones(10))
    assert won == pytest.approx((0.5 + 0.5 / 7) * np.exp(700.0))


def test_rare_large_losses_are_not_clipped() -> None:
    """N4: they undo frequent small gains; a bet on clipped values passed .29."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return np.where(rng.random(n) < 0.07, -0.14, 0.01) + rng.normal(0, 0.003, n)

    won = 0
    for _ in range(400):
        held_out, rehearsal = draw(1500), draw(64)
        won += held_out.mean() > 0 and e_value(held_out, rehearsal) >= 120
    assert won / 400 <= 1 / 120


def test_the_weight_of_evidence_is_the_smaller_of_two() -> None:
    rng = np.random.default_rng(0)
    rehearsal = rng.normal(0.5, 1, size=64)
    for shift in (0.0, 0.3, 0.6):
        held_out = rng.normal(shift, 1, size=200)
        p = p_value(held_out)
        assert p is not None
        assert weight_of_evidence(held_out, rehearsal) == min(e_value(held_out, rehearsal), 1 / p)
    for unknown in ([], [1.0] * 7, [1.0] * 100, [1.0] * 100 + [float("nan")]):
        assert weight_of_evidence(np.array(unknown), rehearsal) == 0.0


# -- losses per example --


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"][0], label_smoothing=batch["smooth"])


def test_the_loss_of_every_example_is_what_it_is_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).eval()
    batch = {"x": torch.randn(9, 4), "y": (torch.randint(3, (9,)),), "smooth": 0.1}
    losses, why = example_losses(model, mean_loss, batch)
    alone = [
        mean_loss(model, {**batch, "x": batch["x"][i : i + 1], "y": (batch["y"][0][i : i + 1],)})
        for i in range(9)
    ]
    assert not why
    torch.testing.assert_close(losses, torch.stack(alone))
    torch.testing.assert_close(losses.mean(), mean_loss(model, batch))


def test_what_does_not_run_under_vmap_is_run_one_by_one_and_says_so() -> None:
    model = nn.Linear(4, 3).eval()

    def branching(model: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss * 2 if loss.item() > 1 else loss

    batch = (torch.randn(9, 4), torch.randint(3, (9,)))
    losses, why = example_losses(model, branching, batch)
    assert why.startswith("RuntimeError: vmap: It looks like you're calling .item()")
    torch.testing.assert_close(
        losses, torch.stack([branching(model, (batch[0][[i]], batch[1][[i]])) for i in range(9)])
    )


def test_a_loss_that_fails_in_itself_is_not_hidden() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        example_losses(
            nn.Linear(5, 3), mean_loss, {"x": torch.randn(2, 4), "y": (torch.zeros(2).long(),), "smooth": 0.0}
        )


def test_batches_are_joined_where_they_fit_and_left_alone_where_not() -> None:
    pairs = [(torch.randn(n, 3), torch.arange(n)) for n in (4, 4, 2)]
    (joined,) = join(pairs)
    assert torch.equal(joined[0], torch.cat([x for x, _ in pairs]))
    assert torch.equal(joined[1], torch.cat([y for _, y in pairs]))
    ragged = [(torch.randn(4, 3, t), torch.arange(4)) for t in (5, 6)]
    assert [b[0].shape for b in join(ragged)] == [(4, 3, 5), (4, 3, 6)]
    mixed = [pairs[0], {"x": pairs[1][0]}]
    assert len(join(mixed)) == 2
    assert join([]) == []


def test_what_is_not_per_example_is_taken_from_the_first_batch() -> None:
    weight = torch.ones(3)
    leaves, per_example, _, count = split_batch((torch.zeros(4, 2), weight, 0.5, None))
    assert (per_example[:3], count) == ([True, False, False], 4)
    assert leaves[1] is weight
    with pytest.raises(ProbeError, match="no tensor with a batch axis"):
        split_batch({"loss": torch.tensor(1.0), "name": "x"})


# -- does the loss couple examples? --
