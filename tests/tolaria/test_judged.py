"""By how much the held-out loss must have fallen, what is said of it, and what a checkpoint keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from esper.tolaria.growth.early.judged import Judged
from esper.tolaria.growth.early.seeds import Decision
from esper.tolaria.growth.early.takeback import Before
from esper.tolaria.growth.run.account import EventRecord


def opened(held_out: float = 2.0, step: int = 30, until: int = 50, at: int = 2) -> tuple[Judged, Any]:
    records = [EventRecord(i, "scheduled", held_out, None, 64) for i in range(3)]
    decision = Decision(4, 1, "0>2", 0.25, 10, 20)
    weights = {"weight": torch.arange(3.0)}
    before = Before(step, 1, [weights], [("0", "out_features", 2)], [{}])
    return Judged(before, until, held_out, [decision], records[at]), records


@pytest.mark.parametrize(("before", "enough"), [(2.0, 1.98), (-2.0, -2.02), (0.0, 0.0)])
def test_an_event_has_won_where_the_loss_fell_by_more_than_a_hundredth(before: float, enough: float) -> None:
    judged, _ = opened(before)
    assert not judged.won(enough, partly=False)
    assert judged.won(math.nextafter(enough, -9), partly=False)
    assert not judged.won(before, partly=True)
    assert judged.won(math.nextafter(before, -9), partly=True)


def test_what_the_earlier_weights_lose_now_counts_before_what_they_lost_then() -> None:
    judged, _ = opened(2.0)
    assert judged.won(3.9, partly=False, than=4.0)
    assert not judged.won(1.9, partly=False, than=1.0)
    assert judged.won(-0.5, partly=False, than=0.0)
    assert not judged.won(0.5, partly=False, than=0.0)
    assert not judged.won(math.nan, partly=True)


def test_what_was_compared_is_said() -> None:
    judged, _ = opened(2.0)
    assert judged.told(2.0, 1.5) == "held-out loss 2 → 1.5"
    assert judged.told(3.0, 1.23456) == "held-out loss 3 → 1.235 (2 as the loss was at the event)"


@pytest.mark.parametrize("extended", [False, True])
def test_an_open_event_is_written_and_read_back(extended: bool) -> None:
    judged, records = opened()
    assert not judged.extended
    judged.extended = extended
    state = judged.state_dict(records)
    assert (state["until"], state["held_out"], state["extended"], state["record"]) == (50, 2.0, extended, 2)
    assert state["decisions"] == [[4, 1, "0>2", 0.25, 10, 20]]
    back = Judged.from_state(state, records)
    assert back.record is records[2]
    assert back.decisions == judged.decisions
    assert isinstance(back.decisions[0], Decision)
    assert (back.until, back.held_out, back.extended) == (50, 2.0, extended)
    assert (back.before.step, back.before.plans, back.before.attributes) == (
        30,
        1,
        [("0", "out_features", 2)],
    )
    assert torch.equal(back.before.tensors[0]["weight"], torch.arange(3.0))
