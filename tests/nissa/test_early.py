"""A run whose growth was scored, inserted at once and judged afterwards reads right in every view."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from esper.contracts import Event
from esper.nissa.run.history import RunHistory, fold
from esper.nissa.run.journal import RunJournal
from esper.nissa.views import charts
from esper.nissa.views.live import LiveView
from esper.nissa.views.map import model_map
from esper.nissa.views.report import write_report
from esper.nissa.views.why import as_text, why

PLACES = ("0>2", "2>4")
HOST, GROWN = 100, 180


def started() -> Event:
    facts = {"between": ["ReLU"], "kind": "pair", "unit_parameters": 10, "unit_flops": 20, "width": 4}
    return Event(
        "run_started",
        0,
        {
            "model": "Net",
            "parameters": HOST,
            "flops": 200,
            "sites": [{"name": name, **facts} for name in PLACES],
            "refused": [],
            "budget": {"parameters": 400},
            "limits": {"parameters": 400, "flops": 3000, "latency_ms": 2.5},
            "growth": "early",
            "seed": 0,
            "steps": 400,
        },
    )


def gate(number: int, site: str, look: int, p_value: float | None, needed: float) -> Event:
    passed = p_value is not None and p_value <= needed
    data = {
        "decision": number,
        "site": site,
        "look": look,
        "e_value": None if p_value is None else 1 / p_value,
        "threshold": 1 / needed,
        "p_value": p_value,
        "needed": needed,
        "gain": 0.01,
        "examples": 256,
        "passed": passed,
        "reason": "held-out evidence" if passed else "the held-out gain may be chance",
    }
    return Event("gate", 40 * look, data)


def decided(number: int, step: int, site: str | None) -> Event:
    facts: dict[str, Any] = {
        "action": "widen" if site else "nothing",
        "site": site,
        "width": 4 if site else 0,
        "start": "scored" if site else None,
        "reason": "scheduled; held-out evidence" if site else "scheduled; no evidence on held-out examples",
        "arms": [{"site": name, "width": 4, "score": 0.01} for name in PLACES],
        "propensity": 1.0,
        "predicted": 1e-4 if site else None,
    }
    return Event("decision", step, {"decision": number, **facts})


def event_that_grows(first: int, step: int, kept: bool) -> Iterator[Event]:
    for number, site in enumerate(PLACES, first):
        yield decided(number, step, site)
        yield gate(number, site, step // 40, 1e-4, 0.01)
    yield Event("reopened", step, {"how": "output", "loss": 0.02, "guess": 2.3})
    for number, site in enumerate(PLACES, first):
        grown = {"decision": number, "site": site, "units": 4, "edits": [["0.weight", 0, 4, 8]]}
        yield Event("widened", step, {**grown, "parameters": GROWN, "difference": 0.0, "milliseconds": None})
    if not kept:
        lost = {"to": step, "lost": 28, "before": 0.4, "now": 0.5, "parameters": GROWN}
        yield Event("taken_back", step + 28, lost)
    for number, site in enumerate(PLACES, first):
        worth = {"gain": 0.01 if kept else None, "parameters": 40 if kept else 0, "flops": 80 if kept else 0}
        reason = "held-out loss 0.6 → 0.4" if kept else "held-out loss 0.4 → 0.5"
        outcome = {"decision": number, "site": site, "kept": kept, **worth, "cost_flops": 0}
        yield Event("outcome", step + 28, {**outcome, "reason": reason})


@pytest.fixture
def told() -> list[Event]:
    """Two places grow together and are kept, nothing passes, two grow and are taken back."""
    nothing = [
        decided(3, 80, None),
        *(gate(3, name, 2, None if name == "0>2" else 0.2, 0.01) for name in PLACES),
    ]
    return [started(), *event_that_grows(1, 40, True), *nothing, *event_that_grows(4, 120, False)]


@pytest.fixture
def early(told: list[Event]) -> RunHistory:
    return fold(told)


def test_what_was_taken_back_is_no_part_of_the_model(early: RunHistory) -> None:
    assert [decision.verdict for decision in early.decisions.values()] == [
        "kept",
        "kept",
        "waited",
        "taken back",
        "taken back",
    ]
    assert early.widths == dict.fromkeys(PLACES, (4, 8))
    assert early.parameters.last == GROWN
    assert early.totals["survived"]["taken_back"] == 1
    assert early.totals["survived"]["steps_taken_back"] == 28
    assert early.totals["growth"] == "early"
    assert early.totals["limits"]["flops"] == 3000


def test_the_explanation_speaks_of_evidence_not_of_a_choice(early: RunHistory) -> None:
    text = as_text(early)
    assert "p-value 0.0001 where 0.01 is needed: passed, held-out evidence" in text
    assert "look 2 at 2>4: gain 0.01 on 256 held out, p-value 0.2 where 0.01 is needed: refused" in text
    assert "look 2 at 0>2: gain 0.01 on 256 held out, p-value – where" in text
    assert "reopened the host was re-opened: its output layer was tempered at training loss 0.02" in text
    assert (
        "taken back: what grew at step 120 did not pay: held-out loss 0.4 → 0.5; 28 steps were lost" in text
    )
    assert "e-value" not in text
    assert "with probability" not in text
    (first,) = why(early, 1)
    assert first["realised"] is None  # what the units gained of themselves is not known
    assert first["gate"][0].keys() >= {"p_value", "needed"}
    assert "e_value" not in first["gate"][0]


def test_the_terminal_says_it_line_by_line(told: list[Event]) -> None:
    console = Console(file=io.StringIO(), width=100)
    with LiveView(console) as view:
        for event in told:
            view(event)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    for line in (
        "[    40] gate passed at 0>2: gain 0.01, p-value 0.0001 where 0.01 is needed",
        "[    40] the host was re-opened: its output layer was tempered at training loss 0.02",
        "[   148] taken back: what grew at step 120 did not pay: held-out loss 0.4 → 0.5; 28 steps were lost",
    ):
        assert line in lines, lines


def test_the_pictures_show_both_ends(early: RunHistory) -> None:
    learning = charts.learning(early)
    assert "+4 0&gt;2, +4 2&gt;4" in learning  # one mark for one step
    assert ">re-opened</text>" in learning
    assert ">taken back</text>" in learning
    assert model_map(early).count("1 kept, 1 taken back") == 2


def test_the_report_tells_limits_evidence_and_what_was_taken_back(told: list[Event], tmp_path: Path) -> None:
    with RunJournal(tmp_path) as journal:
        for event in told:
            journal(event)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for fact in (
        "parameters, at most 400",
        "forward FLOPs per example, at most 3 k",
        "The budget ends growth at 2.5 ms of forward latency.",
        "The evidence on held-out examples",
        "<th>p value</th>",
        '<span class="taken-back">taken back</span>',
        "its output layer was tempered",
        "what grew at step 120 did not pay",
    ):
        assert fact in page, fact
    assert "chosen with probability" not in page
    assert "e value" not in page
