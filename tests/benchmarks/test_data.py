from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.data import PURPOSES, stream
from benchmarks.tasks import TASKS, hidden_widths


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_gives_the_same_run_and_another_seed_another(name: str) -> None:
    task = TASKS[name]
    first, again, other = (task.split(seed) for seed in (3, 3, 4))
    assert torch.equal(first.train[0], again.train[0])
    assert not torch.equal(first.train[0], other.train[0])
    weights = [next(task.build(task.small, seed).parameters()) for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("name", ["digits-mlp", "breast-cancer"])
def test_the_parts_share_no_example(name: str) -> None:
    split = TASKS[name].split(0)
    rows = [{tuple(row) for row in part[0].tolist()} for part in (split.train, split.probe, split.test)]
    sizes = [len(part[0]) for part in (split.train, split.probe, split.test)]
    assert sum(sizes) == {"digits-mlp": 1797, "breast-cancer": 569}[name]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]
    assert sizes[1] / (sizes[0] + sizes[1]) == pytest.approx(0.2, abs=0.01)


def test_breast_cancer_is_standardised_by_the_training_part() -> None:
    split = TASKS["breast-cancer"].split(0)
    assert split.train[0].mean(0).abs().max() < 1e-5
    assert split.test[0].mean(0).abs().max() > 1e-2


def test_shuffled_labels_say_nothing_but_keep_their_shares() -> None:
    shuffled, honest = (TASKS[name].split(0) for name in ("shuffled-digits", "digits-mlp"))
    labels = torch.cat([shuffled.train[1], shuffled.probe[1], shuffled.test[1]])
    assert (
        labels.bincount().tolist()
        == torch.cat([honest.train[1], honest.probe[1], honest.test[1]]).bincount().tolist()
    )
    x, y = (part.numpy() for part in shuffled.train)
    centres = np.stack([x[y == label].mean(0) for label in range(10)])
    spread = np.linalg.norm(centres - centres.mean(0), axis=1).mean()
    x, y = (part.numpy() for part in honest.train)
    honest_centres = np.stack([x[y == label].mean(0) for label in range(10)])
    assert spread < 0.3 * np.linalg.norm(honest_centres - honest_centres.mean(0), axis=1).mean()


def test_data_order_depends_on_the_seed_alone() -> None:
    task = TASKS["digits-mlp"]
    split = task.split(0)

    def first_labels(seed: int) -> list[int]:
        return next(iter(task.batches(split, seed)))[1].tolist()

    before = first_labels(0)
    torch.rand(7)  # what an arm draws from the global generator must not move another arm's data
    assert first_labels(0) == before
    assert first_labels(1) != before


def test_building_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    TASKS["digits-cnn"].build((4, 8), 0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_streams_differ() -> None:
    assert len({stream(seed, purpose) for seed in range(50) for purpose in PURPOSES}) == 50 * len(PURPOSES)


@pytest.mark.parametrize("name", TASKS)
def test_widths_are_read_back(name: str) -> None:
    task = TASKS[name]
    assert hidden_widths(task.build(task.big, 0)) == task.big
