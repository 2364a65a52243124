"""The blueprints bench: hosts with both kinds of places, equal budgets, and what counts as a win."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import esper
from benchmarks import blueprints
from benchmarks.blueprint_tasks import CONTEXT, LETTERS, TASKS
from benchmarks.blueprints import NONE, WIDEN, Job, Trained, train
from benchmarks.flops import parameters


@pytest.mark.parametrize("name", TASKS)
def test_every_host_has_pairs_and_places_for_blueprints(name: str) -> None:
    task = TASKS[name]
    arms = blueprints.fitting(task)
    assert arms[:2] == [NONE, WIDEN]
    assert len(arms) >= 7
    inputs = task.split(0).train[0][:2]
    for arm in arms[1:]:
        where = blueprints.site(task, arm)
        wrapped = esper.wrap(task.build(task.small, 0), inputs, sites=[where], blueprints=[arm])
        assert list(wrapped.places) == [where]


@pytest.mark.parametrize("name", TASKS)
def test_splits_follow_the_seed_and_test_data_are_apart(name: str) -> None:
    split, again, other = (TASKS[name].split(seed) for seed in (3, 3, 4))
    assert torch.equal(split.train[0], again.train[0])
    assert not torch.equal(split.train[0], other.train[0])
    assert all(len(x) == len(y) for x, y in (split.train, split.probe, split.test))
    if name != "sequence":  # a shifted digit keeps its ink unless it stood at the edge
        assert float((split.train[0] > 0).float().mean()) == pytest.approx(0.5, abs=0.1)


def test_characters_are_windows_and_the_sign_behind_them() -> None:
    x, y = TASKS["sequence"].split(0).probe
    assert x.shape[1] == CONTEXT
    seen = torch.cat([x.flatten(), y])
    assert int(seen.min()) >= 0
    assert int(seen.max()) < len(LETTERS)
    assert len(set(LETTERS)) == len(LETTERS)


@pytest.mark.parametrize("arm", [WIDEN, "residual_mlp", "widening_mlp", "low_rank"])
def test_what_is_planted_fills_the_room_and_learns(arm: str) -> None:
    twin, grown = (train(Job("vector", name, 0, 0.01, epochs=6)) for name in (NONE, arm))
    task = TASKS["vector"]
    room = parameters(task.build(task.big, 0)) - parameters(task.build(task.small, 0))
    assert twin.added == twin.growths == 0
    assert 0.7 * room <= grown.added <= room
    assert grown.test_loss != twin.test_loss


def test_a_win_is_surely_below_the_twin_and_on_average_below_widening() -> None:
    one = train(Job("vector", NONE, 0, 0.01, epochs=1))

    def runs(arm: str, losses: list[float]) -> list[Trained]:
        return [replace(one, arm=arm, seed=seed, test_loss=loss) for seed, loss in enumerate(losses)]

    table = {
        NONE: runs(NONE, [1.0, 1.1, 0.9]),
        WIDEN: runs(WIDEN, [0.9, 1.0, 0.8]),
        "sure": runs("sure", [0.8, 0.9, 0.71]),
        "lucky": runs("lucky", [0.3, 1.1, 0.9]),  # one seed of three
        "late": runs("late", [0.95, 1.05, 0.85]),  # below the twin, not below widening
    }
    assert {arm: blueprints.wins(arm, table) for arm in table if arm not in (NONE, WIDEN)} == {
        "sure": True,
        "lucky": False,
        "late": False,
    }
    assert blueprints.wins("sure", {NONE: table[NONE], "sure": table["sure"]}) is None
    single = {arm: results[:1] for arm, results in table.items()}
    assert blueprints.wins("sure", single) is None


@pytest.mark.slow
def test_the_quick_form_writes_every_arm_of_every_task(tmp_path: Path, capsys) -> None:
    line = ["--quick", "--seeds", "1", "--jobs", "0", "--arms", "none,widen,low_rank,conv1x1"]
    assert blueprints.main([*line, "--out", str(tmp_path)]) == 0
    assert "never won, experimental: conv1x1, low_rank" in capsys.readouterr().out
    record = json.loads((tmp_path / "blueprints.json").read_text())
    assert set(record["image"]["summary"]) == {NONE, WIDEN, "conv1x1"}
    assert set(record["sequence"]["summary"]) == {NONE, WIDEN, "low_rank"}
