import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from esper.contracts import EVENT_FIELDS, Event
from esper.errors import RunError
from esper.nissa.run.journal import (
    DURABLE,
    EVENTS_FILE,
    RunJournal,
    decode,
    encode,
    known_events,
    number,
    plain,
    read_events,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def some_events(draw: st.DrawFn) -> Event:
    kind = draw(st.sampled_from(sorted(EVENT_FIELDS)))
    data = {name: draw(VALUES) for name in EVENT_FIELDS[kind]} | draw(
        st.dictionaries(st.text(), VALUES, max_size=2)
    )
    return Event(kind, draw(st.integers(0, 10**9)), data, draw(st.floats(0, 4e9)))


def as_written(event: Event) -> Event:
    return Event(event.kind, event.step, plain(event.data, "test"), event.time)


@given(st.lists(some_events(), max_size=6))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path: Path, events: list[Event]) -> None:
    folder = tmp_path / "round-trip"
    (folder / EVENTS_FILE).unlink(missing_ok=True)
    with RunJournal(folder) as journal:
        for event in events:
            journal(event)
    assert read_events(folder) == [as_written(event) for event in events]


@given(some_events())
def test_a_line_is_one_line_of_strict_json(event: Event) -> None:
    line = encode(event)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(line, parse_constant=refuse)


@given(st.lists(some_events(), min_size=1, max_size=3), st.data())
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_anywhere_in_the_last_line_it_reads_and_resumes(
    tmp_path: Path, events: list[Event], data: st.DataObject
) -> None:
    folder = tmp_path / "torn"
    path = folder / EVENTS_FILE
    path.unlink(missing_ok=True)
    with RunJournal(folder) as journal:
        for event in events:
            journal(event)
    content = path.read_bytes()
    last = encode(events[-1])
    path.write_bytes(content[: len(content) - data.draw(st.integers(0, len(last)))])
    lost = path.read_bytes().split(b"\n")[-1]
    whole = path.read_bytes() == content or len(lost) == len(last) - 1
    expected = [as_written(event) for event in (events if whole else events[:-1])]

    read = read_events(folder)
    assert read[: len(expected)] == expected
    told = [event.kind for event in read[len(expected) :]]
    assert told == (["warning"] if lost and not whole else [])

    with RunJournal(folder) as journal:
        journal(events[0])
    resumed = read_events(folder)
    assert resumed[: len(expected)] == expected
    assert [event.kind for event in resumed[len(expected) : -1]] == told  # the cut itself is in the journal
    assert resumed[-1] == as_written(events[0])
    assert path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1.5, 3])
def test_numbers_survive_even_when_json_has_no_word_for_them(value: float) -> None:
    back = number(json.loads(encode(Event("warning", 0, {"message": "", "x": value})))["data"]["x"])
    assert back == value or (math.isnan(back) and math.isnan(value))


def test_unknown_stays_unknown() -> None:
    assert number(None) is None


def test_a_killed_process_loses_at_most_the_line_it_was_writing(tmp_path: Path) -> None:
    code = (
        "import itertools, sys\n"
        "from esper.contracts import Event\n"
        "from esper.nissa.run.journal import RunJournal\n"
        "journal = RunJournal(sys.argv[1])\n"
        "for step in itertools.count():\n"
        "    journal(Event('warning', step, {'message': 'x' * 20000}))\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for _ in range(50):
        last_told = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    last_told = max([last_told, *map(int, process.stdout.read().split())])
    process.stdout.close()
    process.wait()
    steps = [event.step for event in read_events(tmp_path) if event.data["message"][0] == "x"]
    assert steps == list(range(len(steps)))
    assert steps[-1] >= last_told


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"not json", r"line 1 is damaged"),
        (b"[]", r"line 1 is not an event of Esper"),
        (b'{"kind":"warning"}', r"it has no version"),
        (
            b'{"v":2,"kind":"warning"}',
            r"has version 2, this Esper reads version 1; read the run with the version",
        ),
        (b'{"v":1,"kind":"warning","step":0,"time":0}', r"not a whole event: 'data'"),
        (b'{"v":1,"kind":"party","step":0,"time":0,"data":{}}', r"unknown event kind 'party'"),
        (b'{"v":1,"kind":"warning","step":0,"time":0,"data":{}}', r"lacks message"),
    ],
)
def test_damage_in_the_middle_is_refused_with_its_line(tmp_path: Path, line: bytes, complaint: str) -> None:
    good = encode(Event("warning", 0, {"message": "fine"}))
    (tmp_path / EVENTS_FILE).write_bytes(line + b"\n" + good)
    with pytest.raises(RunError, match=complaint):
        read_events(tmp_path)


def test_a_journal_of_another_version_is_not_appended_to(tmp_path: Path) -> None:
    line = b'{"v":2,"kind":"warning","step":0,"time":0,"data":{"message":""}}\n'
    (tmp_path / EVENTS_FILE).write_bytes(line)
    with pytest.raises(RunError, match="version 2"):
        RunJournal(tmp_path)
    assert (tmp_path / EVENTS_FILE).read_bytes() == line


def test_of_a_run_without_a_sound_journal_nothing_is_known(run: Path, tmp_path: Path) -> None:
    assert known_events(run) == read_events(run)
    assert known_events(tmp_path / "none") == []
    (run / EVENTS_FILE).write_bytes(b"nonsense\n" + (run / EVENTS_FILE).read_bytes())
    assert known_events(run) == []


def test_no_run_names_the_runs_nearby(run: Path) -> None:
    with pytest.raises(RunError, match=rf"no run in {run.parent}: .* runs in .*: {run}"):
        read_events(run.parent)
    with pytest.raises(RunError, match=f"runs in .*: {run}"):
        read_events(run.parent / "rnu")


def test_no_more_than_five_runs_are_named(tmp_path: Path) -> None:
    for index in range(7):
        RunJournal(tmp_path / f"run{index}").close()
    with pytest.raises(RunError) as told:
        read_events(tmp_path)
    assert str(told.value).endswith(f": {', '.join(f'{tmp_path}/run{index}' for index in range(5))}")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"message": object()}, "holds a object"),
        ({"message": b"bytes"}, "holds a bytes"),
        ({"message": "", 3: 4}, "has the key 3"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, data: dict, complaint: str
) -> None:
    with RunJournal(tmp_path) as journal:
        with pytest.raises(RunError, match=complaint):
            journal(Event("warning", 0, data))
        assert journal.path.read_bytes() == b""


def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path)
    journal.close()
    with pytest.raises(RunError, match="is closed"):
        journal(Event("warning", 0, {"message": ""}))


class Disk:
    """Puts a device that is always full in the place of a journal's file, and the file back."""

    def __init__(self, journal: RunJournal) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full on this system")
        self.journal, self.file = journal, journal._file

    def fills_up(self) -> None:
        self.journal._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (closed below)

    def has_room(self) -> None:
        self.journal._file.close()
        self.journal._file = self.file


def warning(message: str, time: float = 0.0) -> Event:
    return Event("warning", 0, {"message": message}, time)


def test_a_full_disk_is_waited_for_and_told_once_at_the_callers_line(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path)
    disk = Disk(journal)
    for begun in (0, 3):  # told again when it is full again
        disk.fills_up()
        with pytest.warns(RuntimeWarning, match="training goes on and events wait in memory") as told:
            journal(warning(str(begun)))
        assert told[0].filename == __file__
        journal(warning(str(begun + 1)))  # says nothing: it would be an error here
        disk.has_room()
        journal(warning(str(begun + 2)))
    disk.fills_up()
    with pytest.warns(RuntimeWarning):
        journal(warning("6"))
    disk.has_room()
    journal.close()  # what waits is written now
    assert [event.data["message"] for event in read_events(tmp_path)] == list("0123456")


def test_a_deleted_journal_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = RunJournal(tmp_path / "run")
    journal(warning("1"))
    assert caplog.messages == []
    shutil.rmtree(tmp_path / "run")
    journal(warning("2"))
    journal(warning("3"))
    journal.close()
    (told,) = caplog.messages
    assert "was deleted while its run goes on" in told


def test_a_journal_that_was_moved_goes_on_where_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = RunJournal(tmp_path / "run")
    journal(warning("1"))
    (tmp_path / "run").rename(tmp_path / "there")
    journal(warning("2"))
    journal.close()
    assert caplog.messages == []
    assert [event.data["message"] for event in read_events(tmp_path / "there")] == ["1", "2"]


def test_more_than_64_mib_that_wait_are_an_error(tmp_path: Path) -> None:
    journal = RunJournal(tmp_path)
    disk = Disk(journal)
    disk.fills_up()
    with pytest.warns(RuntimeWarning, match="training goes on"):
        journal(warning("x" * (64 * 2**20 - len(encode(warning(""))))))
    with pytest.raises(RunError, match="free space and resume"):
        journal(warning(""))
    journal.close()
    journal.close()  # a second time is nothing
    disk.file.close()


@pytest.mark.parametrize("before", [[], ["mine"]])
def test_what_did_not_begin_leaves_the_folder_as_it_was(tmp_path: Path, before: list[str]) -> None:
    run = tmp_path / "run"
    if before:
        with RunJournal(run) as journal:
            journal(warning(before[0]))
    journal = RunJournal(run)
    journal(warning("begun"))
    disk = Disk(journal)
    disk.fills_up()
    with pytest.warns(RuntimeWarning):
        journal(warning("waits"))
    disk.has_room()
    journal.take_back()
    assert run.exists() is bool(before)
    assert [event.data["message"] for event in known_events(run)] == before
    RunJournal(run).close()  # it is free again


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another run_dir"):
        RunJournal(tmp_path / "file")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no /sys here")
def test_why_a_folder_cannot_be_made_is_told() -> None:
    with pytest.raises(RunError, match=r"Operation not permitted|Permission denied|Read-only file system"):
        RunJournal("/sys/esper/run")


@pytest.mark.parametrize("place", [None, 3, ["run"], b"run", "a\0b", object()])
def test_a_run_folder_is_a_path(place: object) -> None:
    with pytest.raises(RunError, match=r"run_dir=.* is no path"):
        RunJournal(place)


def test_the_time_of_an_event_is_kept(tmp_path: Path) -> None:
    before = time.time()
    with RunJournal(tmp_path) as journal:
        journal(Event("warning", 0, {"message": ""}))
    assert before <= read_events(tmp_path)[0].time <= time.time()


def test_decode_names_where(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="over there"):
        decode(b"{", "over there")


def test_a_last_line_that_lacks_only_its_line_feed_is_whole(tmp_path: Path) -> None:
    event = Event("warning", 7, {"message": "fine"})
    (tmp_path / EVENTS_FILE).write_bytes(encode(event).rstrip())
    assert read_events(tmp_path) == [event]
    with RunJournal(tmp_path) as journal:
        journal(event)
    assert read_events(tmp_path) == [event, event]


def test_a_line_that_reached_the_disk_in_part_is_ended_later(tmp_path: Path) -> None:
    """A file-size limit cuts a write short, as a full disk may."""
    code = (
        "import resource, sys\n"
        "from esper.contracts import Event\n"
        "from esper.nissa.run.journal import RunJournal\n"
        "journal = RunJournal(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))\n"
        "journal(Event('warning', 0, {'message': 'x' * 100}))\n"
        "assert journal.path.stat().st_size == 50\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, resource.RLIM_INFINITY))\n"
        "journal(Event('warning', 1, {'message': 'y'}))\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], check=True)
    assert [event.data["message"] for event in read_events(tmp_path)] == ["x" * 100, "y"]


def test_a_journal_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).mkdir()
    with pytest.raises(RunError, match=r"cannot read the journal .*: it is a folder"):
        read_events(tmp_path)


@pytest.mark.parametrize(
    "spoilt", [b"\0" * 40 + b"\n", b"{\n[1\n\0\0", b"[" * 50_000 + b"\n", b"\xff\n\xfe\n\xfd"]
)
def test_damaged_last_lines_are_stepped_over_and_told(tmp_path: Path, spoilt: bytes) -> None:
    events = [Event("warning", step, {"message": "fine"}) for step in range(3)]
    whole = b"".join(map(encode, events))
    (tmp_path / EVENTS_FILE).write_bytes(whole + spoilt)
    *sound, told = read_events(tmp_path)
    assert sound == events
    assert "left out" in told.data["message"]
    assert told.step == 2  # that of the last whole event
    with RunJournal(tmp_path) as journal:
        journal(Event("warning", 3, {"message": "on"}))
    *sound, told, last = read_events(tmp_path)
    assert (sound, told.step, last.data["message"]) == (events, 2, "on")
    assert f"({len(spoilt)} bytes) and left out" in told.data["message"]


def test_a_file_without_a_whole_line_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / EVENTS_FILE).write_bytes(b"mine\nand only mine")
    for opened in (read_events, RunJournal):
        with pytest.raises(RunError, match="line 1 is damaged"):
            opened(tmp_path)
    assert (tmp_path / EVENTS_FILE).read_bytes() == b"mine\nand only mine"


@pytest.mark.parametrize("place", ["pipe", "/dev/full", "/dev/zero", "/dev/null", "loop", "linked"])
def test_only_a_file_of_the_folder_itself_is_a_journal(tmp_path: Path, place: str) -> None:
    (tmp_path / "linked").write_bytes(b"precious")
    path = tmp_path / EVENTS_FILE
    if place == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(EVENTS_FILE if place == "loop" else place)
    for opened in (read_events, RunJournal):
        with pytest.raises(RunError, match=r"cannot read the journal .*: it is a (pipe|link)"):
            opened(tmp_path)
    assert (tmp_path / "linked").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "change", [{"step": "1"}, {"step": True}, {"step": -1}, {"time": "now"}, {"data": [1]}, {"kind": ["a"]}]
)
def test_an_event_has_its_types(change: dict) -> None:
    record = {"v": 1, "kind": "warning", "step": 0, "time": 0, "data": {"message": ""}, **change}
    with pytest.raises(RunError, match=f"its {next(iter(change))} is "):
        decode(json.dumps(record).encode(), "it")


def test_what_growth_decided_is_on_the_disk_when_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def counted(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", counted)
    with RunJournal(tmp_path) as journal:
        for kind in EVENT_FIELDS:
            before = len(synced)
            journal(Event(kind, 1, dict.fromkeys(EVENT_FIELDS[kind], 0)))
            assert synced[before:] == ([journal.path.stat().st_size] if kind in DURABLE else [])
    assert {"decision", "gate", "widened", "grafted"} <= DURABLE


def test_a_killed_run_s_decisions_are_found_by_the_process_that_goes_on(
    tmp_path: Path, events: list[Event]
) -> None:
    torn = encode(next(event for event in events if event.kind == "decision" and event.step == 480))[:-20]
    with RunJournal(tmp_path) as journal:
        for event in events:
            if event.step <= 470:
                journal(event)
    with open(tmp_path / EVENTS_FILE, "ab") as file:
        file.write(torn)
    with RunJournal(tmp_path) as journal:
        journal(events[0])
        found = journal.decided_after(100)
        assert list(found) == [270, 400]  # a decision that was being written is not one yet
        assert found[270]["site"] == "conv1>conv2"
        assert found[400]["action"] == "nothing"
