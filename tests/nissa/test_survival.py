"""What a run survived reads the same in every view."""

from __future__ import annotations

from collections.abc import Callable

from esper.contracts import Event
from esper.nissa.run.history import fold
from esper.nissa.run.survival import notes, of_checkpoints
from esper.nissa.views import charts
from esper.nissa.views.why import as_text


def cut_off(events: list[Event], survived: Callable[[], list[Event]]) -> list[Event]:
    """The run, killed at step 322 and gone on from step 200."""
    first, mark, *rest = survived()
    again = sorted([*(event for event in events if event.step > 200), *rest], key=lambda event: event.step)
    return [*(event for event in events if event.step <= 322), first, events[0], mark, *again]


def test_what_befell_a_run_is_told_in_order_and_once(
    events: list[Event], survived: Callable[[], list[Event]]
) -> None:
    history = fold(cut_off(events, survived))
    assert [(note.step, note.kind, note.text) for note in notes(history)] == [
        (200, "resumed", "went on from step-00000200; at least 120 steps are done again"),
        (450, "alarm", "loss 12.5, usual 0.2; rollback"),
        (450, "rolled back", "rolled back to step 440: loss 12.5"),
        (460, "processes", "rank 1: lost: no heartbeat in 30 s; 1 is running"),
        (470, "wrapped again", "conv1>conv2 is in the layers now; 12 ms"),
    ]
    assert of_checkpoints(history) == (
        "1 checkpoint, the last at step 200 (51.2 kB); training stood still for 2 ms in all"
    )
    assert history.loss == fold(events).loss
    assert history.totals["survived"] == {
        "checkpoints": 1,
        "resumes": 1,
        "steps_redone": 120,
        "alarms": 1,
        "rollbacks": 1,
        "steps_rolled_back": 10,
        "taken_back": 0,
        "steps_taken_back": 0,
        "faults": 1,
        "processes_told": 1,
    }


def test_the_explanations_end_with_it(events: list[Event], survived: Callable[[], list[Event]]) -> None:
    history = fold(cut_off(events, survived))
    assert as_text(history).splitlines()[-6:] == [
        "What the run survived, by step",
        "  200      resumed: went on from step-00000200; at least 120 steps are done again",
        "  450      alarm: loss 12.5, usual 0.2; rollback",
        "  450      rolled back: rolled back to step 440: loss 12.5",
        "  460      processes: rank 1: lost: no heartbeat in 30 s; 1 is running",
        "  470      wrapped again: conv1>conv2 is in the layers now; 12 ms",
    ]
    assert "survived" not in as_text(history, 2)
    assert "survived" not in as_text(fold(events))


def test_the_loss_is_marked_where_it_happened(
    events: list[Event], survived: Callable[[], list[Event]]
) -> None:
    back = {"to": 500, "lost": 30, "before": 0.2, "now": 0.3, "parameters": 802}
    early = [
        Event("reopened", 500, {"how": "output", "loss": 0.01, "guess": 2.3}),
        Event("taken_back", 530, back),
    ]
    whole = sorted([*cut_off(events, survived), *early], key=lambda event: event.step)
    marked, bare = (charts.learning(fold(told)) for told in (whole, events))
    for kind in charts.BEFELL:
        assert f">{kind}</text>" in marked
        assert f">{kind}</text>" not in bare
    assert marked.count(charts.PURPLE.lower()) - bare.count(charts.PURPLE.lower()) >= 4  # 2 bands, mark, key
