import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from esper.contracts import Event
from esper.errors import RunError
from esper.nissa.run.damage import fitting
from esper.nissa.run.history import fold
from esper.nissa.run.journal import EVENTS_FILE, RunJournal, decode
from esper.nissa.views.report import write_report
from esper.nissa.views.why import as_text

ROW = {"name": "grown", "accuracy": 0.9721, "parameters": 1138, "flops": 4.19e9, "seconds": 9.2}
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The page's text, what it refers to, and whether its tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += " " + data if data.strip() else ""


def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_is_one_file_that_refers_to_nothing_outside(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    page = page_of(path)
    assert all(link.startswith("#") for link in page.links)
    assert "script" not in page.tags
    assert "@import" not in path.read_text()
    assert "url(http" not in path.read_text()


def test_it_tells_the_whole_run(run: Path) -> None:
    page = page_of(write_report(run))
    for fact in (
        "426 → 1,138",
        "0.959",
        "4.14 G",
        "50 M",
        "9.2 s",
        "conv1>conv2 from 4 to 8 units",
        "no arm promises more than doing nothing",
        "e-value 0.3 stayed below 320",
        "its outputs are the model's outputs",
        "FloatingPointError: inf in the branch",
        "host output used at conv1>conv2",
        "predicted per FLOP",
        "5.208e-07",
    ):
        assert fact in page.text, fact
    assert page.tags.count("details") == 4
    assert page.tags.count("svg") == 4


def test_it_tells_what_the_run_survived(run: Path, survived: Callable[[], list[Event]]) -> None:
    with RunJournal(run) as journal:
        for event in survived():
            journal(event)
    page = page_of(write_report(run))
    for fact in ("What the run survived", "loss 12.5, usual 0.2", "rolled back to step 440", "no heartbeat"):
        assert fact in page.text, fact


def test_what_a_run_says_is_text_never_markup(run: Path) -> None:
    source = write_report(run).read_text(encoding="utf-8")
    assert "was not given &lt;b&gt;" in source
    assert "was not given <b>" not in source


def test_it_compares_with_what_did_not_grow(run: Path, events: list[Event]) -> None:
    with RunJournal(run / "twin") as journal:
        for event in events:
            if event.kind in ("run_started", "progress", "epoch", "run_finished"):
                journal(event)
    rows = [ROW, {**ROW, "name": "no growth", "accuracy": 0.9312, "run": "twin"}]
    (run / "comparison.json").write_text(json.dumps(rows))
    page = page_of(write_report(run))
    assert "0.9312" in page.text
    assert page.text.count("no growth") == 3  # the table and the two pictures


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not JSON"),
        ("{}", "must hold a list of rows"),
        (json.dumps([{"name": "grown"}]), "a row lacks accuracy, parameters, flops, seconds"),
        (json.dumps([{**ROW, "run": "gone"}]), "names the run 'gone'"),
    ],
)
def test_a_damaged_comparison_is_refused(run: Path, content: str, complaint: str) -> None:
    (run / "comparison.json").write_text(content)
    with pytest.raises(RunError, match=complaint):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_run_cut_off_in_the_middle_is_still_reported(run: Path) -> None:
    path = run / EVENTS_FILE
    path.write_bytes(path.read_bytes()[:9000])
    page = page_of(write_report(run))
    assert "The run has not finished." in page.text
    assert "was torn" in page.text


def test_a_run_that_grew_nothing_is_reported(tmp_path: Path, events: list[Event]) -> None:
    with RunJournal(tmp_path) as journal:
        journal(events[0])
    page = page_of(write_report(tmp_path))
    assert "Nothing was kept" in page.text
    assert "No decision was due." in page.text


def test_an_empty_run_is_refused(tmp_path: Path) -> None:
    RunJournal(tmp_path).close()
    with pytest.raises(RunError, match="no run_started event"):
        write_report(tmp_path)


def test_a_place_that_cannot_be_written_is_refused(run: Path) -> None:
    with pytest.raises(RunError, match="choose another place"):
        write_report(run, run / "missing" / "report.html")


def test_without_jinja_the_error_is_its_pip_line() -> None:
    code = (
        "import sys; sys.modules['jinja2'] = None\n"
        "from esper.errors import MissingExtraError\n"
        "try: import esper.nissa.views.report\n"
        "except MissingExtraError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'esper-morph[report]'" in ran.stdout


@pytest.mark.parametrize("elsewhere", ["../secret", "/etc", "", 3, ["a"], "a\0b", "linked"])
def test_a_comparison_names_runs_below_it_only(run: Path, elsewhere: object) -> None:
    (run / "linked").symlink_to(run.parent)
    (run / "comparison.json").write_text(json.dumps([{**ROW, "run": elsewhere}]))
    with pytest.raises(RunError, match="give a folder below"):
        write_report(run)


@pytest.mark.parametrize("text", ["[" * 50_000, "[1", '[{"name": ["a"]}]', "x" * (1 << 20) + "x"])
def test_a_damaged_comparison_is_one_error(run: Path, text: str) -> None:
    (run / "comparison.json").write_text(text)
    with pytest.raises(RunError, match=r"comparison\.json") as raised:
        write_report(run)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("change", [{"name": 3}, {"accuracy": "high"}, {"flops": True}, {"seconds": [1]}])
def test_a_row_has_its_types(run: Path, change: dict) -> None:
    (run / "comparison.json").write_text(json.dumps([{**ROW, **change}]))
    with pytest.raises(RunError, match="comparison"):
        write_report(run)


@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "linked"])
def test_a_comparison_is_a_file_of_the_folder_itself(run: Path, place: str) -> None:
    (run / "linked").write_text("[]")
    if place == "pipe":
        os.mkfifo(run / "comparison.json")
    else:
        (run / "comparison.json").symlink_to(place)
    with pytest.raises(RunError, match="cannot read the comparison"):
        write_report(run)


def test_a_report_is_not_written_to_a_pipe(run: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunError, match="no regular file"):
        write_report(run, tmp_path / "pipe")


def test_events_that_do_not_fit_together_are_one_error(run: Path) -> None:
    """Every value of one event of each kind is replaced by others; they are read, or a RunError says why."""
    lines = [json.loads(line) for line in (run / EVENTS_FILE).read_text().splitlines()]
    for number in {line["kind"]: number for number, line in enumerate(lines)}.values():
        for key in lines[number]["data"]:
            for odd in (None, "x", [1], {"a": 1}, -1, 1e308, True):
                spoilt = [*lines]
                spoilt[number] = {**lines[number], "data": {**lines[number]["data"], key: odd}}
                told_of(spoilt, run)


def told_of(lines: list[dict], run: Path) -> None:
    events = [decode(json.dumps(line).encode(), "it") for line in lines]
    with contextlib.suppress(RunError), fitting(run):
        history = fold(events)
        assert as_text(history) is not None
        assert history.totals
