"""What stands of a journal that several processes wrote, and what a new process takes again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import Event
from esper.nissa.run.history import RunHistory, fold
from esper.nissa.run.standing import Standing, decided_after

BEGIN: dict[str, Any] = {
    "model": "Net",
    "parameters": 10,
    "flops": 20,
    "sites": [{"name": "a>b", "width": 4}],
    "refused": [],
    "budget": {},
    "seed": 0,
    "steps": 60,
}
DECISIONS = (10, 20, 30, 40)


def begin(step: int = 0) -> Event:
    return Event("run_started", step, BEGIN)


def resumed(step: int) -> Event:
    return Event("resumed", step, {"step": step, "name": f"step-{step:08d}"})


def decision(step: int, site: str = "a>b", width: int = 4) -> Event:
    data = {"decision": step // 10, "action": "widen", "site": site, "width": width, "start": "svd"}
    return Event("decision", step, {**data, "reason": "", "arms": [], "propensity": 1.0, "predicted": None})


def progress(step: int) -> Event:
    spent = {"parameters": 10, "growth_flops": 0, "training_flops": step, "seconds": step / 100}
    return Event("progress", step, {"loss": 1 / (1 + step), **spent})


def warning(step: int, message: str) -> Event:
    return Event("warning", step, {"message": message})


def steps(start: int, stop: int) -> Iterator[Event]:
    """What a process tells of the steps behind ``start`` up to ``stop``."""
    for step in range(start + 1, stop + 1):
        if step in DECISIONS:
            yield decision(step)
        yield progress(step)


def process(start: int, stop: int) -> list[Event]:
    """A process that goes on from a checkpoint, or from the beginning, until it is killed."""
    marks = [begin(start), resumed(start)] if start else []
    return [begin(), warning(0, "steps= was not given"), *marks, *steps(start, stop)]


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=6))
def test_however_often_it_was_killed_every_step_is_told_once(kills: list[tuple[int, int]]) -> None:
    told, reached = process(0, 25), 25
    lost = []
    for back, further in kills:
        start = min(back, reached)
        lost.append(reached - start if start else None)
        reached = min(60, start + further)
        told += process(start, reached)
    history = fold(told)
    assert history.loss.steps == list(range(1, reached + 1))
    assert [one.step for one in history.decisions.values()] == [at for at in DECISIONS if at <= reached]
    fresh = max((i for i, one in enumerate(lost) if one is None), default=-1)  # the run began anew there
    assert [one.redone for one in history.resumes] == lost[fresh + 1 :]
    assert all(one.name == f"step-{one.step:08d}" for one in history.resumes)
    assert len(history.warnings) == 1


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=4))
def test_a_view_that_is_told_one_by_one_knows_the_same(kills: list[tuple[int, int]]) -> None:
    told, reached = process(0, 25), 25
    for back, further in kills:
        start = min(back, reached)
        reached = start + further
        told += process(start, reached)
    history = RunHistory()
    for event in told:
        history.add(event)
    assert history == fold(told)


def test_a_process_that_is_killed_before_it_went_on_leaves_nothing_behind() -> None:
    told = [*process(0, 25), begin(), begin(), *process(10, 40)[1:]]
    assert fold(told).loss.steps == list(range(1, 41))


def test_what_a_process_says_before_it_goes_on_is_kept_at_the_step_it_went_on_from() -> None:
    told = [*process(0, 25), begin(), warning(0, "step-00000020 is damaged"), begin(10), resumed(10)]
    history = fold(told)
    assert [(one.step, one.data["message"]) for one in history.warnings] == [
        (0, "steps= was not given"),
        (10, "step-00000020 is damaged"),
    ]


def test_an_epoch_that_ends_again_behind_its_checkpoint_counts_once() -> None:
    epoch = Event("epoch", 20, {"epoch": 2, "metrics": {"accuracy": 0.5}})
    other = Event("epoch", 20, {"epoch": 2, "metrics": {"accuracy": 0.75}})
    for again in (epoch, other):
        history = fold([*process(0, 20), epoch, *process(20, 20), again, *steps(20, 30)])
        assert [one.epoch for one in history.epochs] == [2]
        assert history.epochs[-1].metrics == again.data["metrics"]


def test_a_resume_inside_a_process_undoes_too() -> None:
    told = [*process(0, 30), resumed(10), *steps(10, 15)]
    assert fold(told).loss.steps == list(range(1, 16))
    assert fold(told).resumes[0].redone == 20


def test_a_finished_run_that_goes_on_is_not_finished() -> None:
    data = {"parameters": 10, "flops": 20, "training_flops": 1, "growth_flops": 0, "seconds": 1.0}
    done = Event("run_finished", 60, {**data, "grown": []})
    assert fold([*process(0, 60), done]).finished
    assert fold([*process(0, 60), done, *process(60, 60)]).finished is None


def test_a_view_that_knows_nothing_of_before_takes_the_widths_it_is_told() -> None:
    wider = {**BEGIN, "sites": [{"name": "a>b", "width": 9}]}
    history = fold([begin(), Event("run_started", 30, wider), resumed(30)])
    assert history.widths == {"a>b": (4, 9)}
    assert history.resumes[0].redone is None


def test_decisions_behind_the_checkpoint_are_taken_again_as_journalled() -> None:
    told = [*process(0, 25), begin()]
    assert list(decided_after(told, 15)) == [20]
    assert decided_after(told, 5) == {10: decision(10).data, 20: decision(20).data}
    assert decided_after([*told, begin(15)], 15) == {20: decision(20).data}
    assert decided_after(told, 25) == {}


def test_what_was_not_taken_again_yet_is_still_to_be_taken() -> None:
    told = [*process(0, 35), *process(5, 22), begin()]  # the second process was killed before step 30
    assert list(decided_after(told, 5)) == [10, 20, 30]


def test_a_later_process_has_the_last_word() -> None:
    other = decision(20, width=8)
    told = [*process(0, 35), begin(), begin(15), resumed(15), other, progress(21), begin()]
    assert decided_after(told, 15)[20]["width"] == 8
    passed = [*process(0, 35), begin(), begin(15), resumed(15), progress(21), begin()]  # nothing at 20
    assert list(decided_after(passed, 5)) == [10, 30]


def test_another_run_s_decisions_in_the_folder_are_not_taken_again() -> None:
    other = [begin(), *(progress(step) for step in range(1, 9))]  # began anew, killed at step 8
    assert decided_after([*process(0, 35), *other, begin()], 5) == {}


def test_a_checkpoint_that_was_told_after_its_step_stands() -> None:
    told = [Event("checkpoint", 21, {"name": "", "step": at, "bytes": 1, "seconds": 0.0}) for at in (20, 21)]
    history = fold([*process(0, 25), *told, *process(20, 30)])
    assert [one.data["step"] for one in history.checkpoints] == [20]


def test_what_stands_is_never_less_than_the_last_process_told() -> None:
    told = [*process(0, 25), *process(10, 12)]
    kept = Standing()
    for event in told:
        kept.add(event)
    assert kept.events[-3:] == told[-3:]
