"""Lines over features against what exact Bayesian regression says, and what a changed world does to them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from esper.errors import StateError
from esper.tamiyo.bandits.auto import Auto
from esper.tamiyo.beliefs.changes import Cusum
from esper.tamiyo.beliefs.lines import NOISE, OWN, SHARED, Lines


def observed(lines: Lines, count: int = 30, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Let a belief see rewards of one arm that follow a line; returns the rows and the rewards."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate([np.full((count, 1), 0.5), rng.normal(size=(count, 2))], axis=1)
    rewards = 0.4 + rows @ [0.1, 0.2, -0.1] + 0.05 * rng.normal(size=count)
    for row, reward in zip(rows, rewards, strict=True):
        lines.learn("a", row, float(reward))
    return rows, rewards


def test_one_line_for_all_is_bayesian_linear_regression() -> None:
    lines = Lines(columns=None, own=False)
    rows, rewards = observed(lines)
    design = np.concatenate([np.ones((len(rows), 1)), rows], axis=1)
    before = np.diag(1 / np.array([1.0, 1.0, 0.5, 0.5])) / SHARED**2
    after = np.linalg.inv(before + design.T @ design / NOISE**2)
    expected = after @ (before @ [0.0, 1.0, 0.0, 0.0] + design.T @ rewards / NOISE**2)
    mean, variance = lines.believed(["any"], rows[:1])
    assert lines.mean == pytest.approx(expected)
    assert mean == pytest.approx(design[:1] @ expected)
    assert variance == pytest.approx(design[0] @ after @ design[0])


def test_before_any_experience_a_reward_is_its_prior_give_or_take() -> None:
    mean, variance = Lines(columns=1, own=True).believed(["a", "b"], np.array([[0.2], [0.9]]))
    assert mean == pytest.approx([0.2, 0.9])
    assert variance == pytest.approx([(SHARED**2 + OWN**2) * (1 + p**2) for p in (0.2, 0.9)])


def test_what_one_arm_brought_moves_another_less_than_itself() -> None:
    lines, row = Lines(columns=1, own=True), np.array([0.5])
    for _ in range(5):
        lines.learn("bad", row, 0.0)
    own, other = lines.believed(["bad", "new"], np.stack([row, row]))[0]
    assert own < 0.1 < other < 0.4


def test_a_changed_world_is_noticed_and_only_what_came_since_is_believed() -> None:
    lines, row, rng = Lines(columns=1, own=True), np.array([0.5]), np.random.default_rng(0)
    for _ in range(60):
        lines.learn("a", row, 0.9 + 0.1 * float(rng.normal()))
    assert lines.restarts == 0
    for _ in range(6):
        lines.learn("a", row, 0.0)
    assert lines.restarts == 1
    assert lines.believed(["a"], row[None])[0][0] < 0.2
    assert lines.believed(["b"], row[None])[0][0] < 0.5  # nor does it believe of others what was


def test_one_outlier_is_no_change_and_many_ordinary_ones_neither() -> None:
    cusum, rng = Cusum(15.0), np.random.default_rng(0)
    assert not cusum.tells(1e9)
    assert not any(cusum.tells(float(z * z)) for z in rng.normal(size=2000))
    fresh = Cusum(15.0)
    assert [fresh.tells(9.0) for _ in range(3)] == [False, False, True]  # 7.5 each, and more than 15


def test_auto_follows_the_belief_that_predicts() -> None:
    def evidence(own: bool) -> str:
        rng, bandit = np.random.default_rng(0), Auto()
        for at in range(150):
            row = np.array([0.5, *rng.normal(size=2)])
            arm = ("a", "b")[at % 2]
            worth = (0.8 if arm == "a" else 0.2) if own else 0.5 + 0.2 * row[1]
            bandit.learn(arm, row, worth + 0.1 * float(rng.normal()))
        return max(bandit.evidence, key=bandit.evidence.__getitem__)

    assert (evidence(own=True), evidence(own=False)) == ("means", "line")


def test_a_belief_goes_through_json_and_on_alike() -> None:
    one, other = Lines(None, True), Lines(None, True)
    observed(one)
    state = json.loads(json.dumps(one.state_dict()))
    other.load_state_dict(state)
    observed(one, 5, seed=1)
    observed(other, 5, seed=1)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("weights", 1, "1 weights; 0, or 2 and more"),
        ("weights", "4", "weights; 0, or 2 and more"),
        ("shared", [[0.0]], "shared is .* two values"),
        ("shared", [[0.0, 1.0, 0.0, float("nan")], [[0.0]]], "finite numbers of shape"),
        ("arms", [["a", [0.0]]], "arms have"),
        ("arms", [[{}, [0.0] * 4, [[0.0] * 4] * 4]], "a bandit's arm is named"),
        ("noise", None, "noise is None"),
        ("seen", [["a", [0.0], 1.0]], "finite numbers of shape"),
    ],
)
def test_a_state_that_is_none_is_refused_and_nothing_is_forgotten(
    key: str, value: object, match: str
) -> None:
    lines = Lines(None, True)
    observed(lines)
    before = json.dumps(lines.state_dict())
    with pytest.raises(StateError, match=match):
        lines.load_state_dict({**lines.state_dict(), key: value})
    assert json.dumps(lines.state_dict()) == before


def test_arms_described_otherwise_than_before_are_refused() -> None:
    lines = Lines(None, True)
    observed(lines)
    with pytest.raises(StateError, match="arms come with 4 features, and what was learned is about 3"):
        lines.believed(["a"], np.zeros((1, 4)))
