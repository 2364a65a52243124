import io
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from esper.contracts import Event
from esper.nissa.views.live import DECISIONS, ROWS, LiveView


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=140, height=40)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(view: LiveView) -> str:
    page = Console(file=io.StringIO(), width=140, height=40)
    page.print(view._screen())
    return shown(page)


def test_without_a_terminal_it_prints_a_line_per_notable_event(events: list[Event]) -> None:
    console = Console(file=io.StringIO(), width=60)
    with LiveView(console) as view:
        for event in events:
            view(event)
    lines = shown(console).splitlines()
    assert lines[0] == "[     0] DigitsCNN: 426 parameters, can grow at 2 sites"
    for line in (
        "[    90] decision 1: widen conv2>fc by 8 (scheduled; conv2>fc promises most per FLOP)",
        "[   180] conv2>fc grew by 8 units, 802 parameters now",
        "[   290] conv1>conv2 not kept: e-value 0.3 stayed below 320; the host never felt it",
        "[   505] fault 1 at conv1>conv2: FloatingPointError: inf in the branch",
        "[     0] warning: steps= was not given <b>",
        "[   900] finished: 1,138 parameters, 9.2 s",
    ):
        assert line in lines, line
    assert len([line for line in lines if "] loss" in line]) == 10  # 46 progress events, one line per tenth


def test_plain_lines_can_be_asked_for_on_a_terminal(events: list[Event]) -> None:
    console = terminal()
    with LiveView(console, plain=True) as view:
        view(events[0])
    assert "\x1b[?25l" not in shown(console)  # the cursor is not hidden: no live screen


def test_the_screen_shows_progress_sites_and_reasons(events: list[Event]) -> None:
    view = LiveView(terminal())
    assert "waiting" in drawn(view)
    for event in events:
        view(event)
    screen = drawn(view)
    for fact in (
        "step 900 of 900",
        "parameters 426 → 1,138",
        "4 → 8",
        "dormant",
        "do nothing",
        "e-value 0.3 stayed below 320",
        "steps= was not given <b>",
        "1 fault, last at conv1>conv2",
    ):
        assert fact in screen, fact


def test_an_event_draws_nothing_on_the_thread_that_trains(
    events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawers: set[int] = set()
    screen = LiveView._screen

    def watched(view: LiveView) -> object:
        drawers.add(threading.get_ident())
        return screen(view)

    monkeypatch.setattr(LiveView, "_screen", watched)
    console = terminal()
    with LiveView(console) as view:
        drawers.clear()  # entering draws the first screen
        for _ in range(20):
            for event in events:
                view(event)
        by_training_thread = threading.get_ident() in drawers
    assert not by_training_thread
    assert "step 900 of 900" in shown(console)  # leaving draws the last one


def test_a_large_model_does_not_flood_the_screen(events: list[Event]) -> None:
    site = events[0].data["sites"][0]
    many = [{**site, "name": f"block{index}"} for index in range(100)] + list(events[0].data["sites"])
    view = LiveView(terminal())
    view(replace(events[0], data={**events[0].data, "sites": many}))
    for event in events[1:]:
        view(event)
    screen = drawn(view)
    assert f"and {102 - ROWS} more" in screen
    assert "conv2>fc" in screen  # where something happened comes first
    assert len(screen.splitlines()) <= ROWS + DECISIONS + 8


def test_without_a_number_of_steps_the_bar_only_moves(events: list[Event]) -> None:
    view = LiveView(terminal())
    view(replace(events[0], data={**events[0].data, "steps": None}))
    assert "step 0 " in drawn(view)


def test_what_befalls_a_run_is_told_in_lines_and_on_the_screen(
    events: list[Event], survived: Callable[[], list[Event]]
) -> None:
    console = Console(file=io.StringIO())
    view = LiveView(console)
    for event in [events[0], *survived()[:-1]]:
        view(event)
    told = drawn(view)
    view(survived()[-1])
    lines = shown(console).splitlines()
    for line in (
        "[   201] checkpoint step-00000200, 51.2 kB",
        "[   200] went on from step-00000200; at least 1 step is done again",
        "[   450] alarm: loss 12.5, usual 0.2; rollback",
        "[   450] rolled back to step 440: loss 12.5",
        "[   460] rank 1: lost: no heartbeat in 30 s; 1 is running",
        "[   470] wrapped again: conv1>conv2 is in the layers now; 12 ms",
    ):
        assert line in lines, line
    for fact in ("alarm at step 450: loss 12.5", "rolled back to step 440", "lost: no heartbeat"):
        assert fact in told, fact


def test_a_run_that_goes_on_is_shown_with_what_it_did_before(events: list[Event]) -> None:
    console = Console(file=io.StringIO())
    view = LiveView(console, past=[event for event in events if event.step <= 322])
    assert shown(console) == ""  # it was said by another process
    view(events[0])
    view(Event("resumed", 300, {"step": 300, "name": "step-00000300"}))
    assert shown(console).splitlines()[-1] == (
        "[   300] went on from step-00000300; at least 20 steps are done again"
    )
    screen = drawn(view)
    for fact in ("8 → 16", "held-out gain 0.021, +672 parameters", "resumed at step 300: went on from"):
        assert fact in screen, fact
    assert max(view.history.loss.steps) == 300
