import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.contracts import Event
from esper.nissa.run.history import RunHistory, fold
from esper.nissa.run.journal import RunJournal

_spec = importlib.util.spec_from_file_location("stream", Path(__file__).with_name("stream.py"))
stream = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stream)


@pytest.fixture
def events() -> list[Event]:
    """A whole run: two growths kept, one refused, one decision to wait, one fault."""
    return stream.digits_run()


@pytest.fixture
def history(events: list[Event]) -> RunHistory:
    return fold(events)


@pytest.fixture
def run(tmp_path: Path, events: list[Event]) -> Path:
    """The same run as a folder, written by the journal."""
    folder = tmp_path / "run"
    with RunJournal(folder) as journal:
        for event in events:
            journal(event)
    return folder


@pytest.fixture
def survived() -> Callable[[], list[Event]]:
    """Every event that tells what befell a run and did not end it."""
    return stream.survived
