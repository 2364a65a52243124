"""A folder has one holder, which a killed or forked process does not outlive."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.contracts import Event
from esper.errors import RunError
from esper.nissa.run.journal import RunJournal, read_events
from esper.storage.lease import LEASE_FILE, Lease

HOLD = """
import os, sys, time
from esper.nissa.run.journal import RunJournal
journal = RunJournal(sys.argv[1])
reader, writer = os.pipe()
if sys.argv[2] == "fork":
    if os.fork() == 0:
        os.write(writer, b".")
        time.sleep(60)
    os.read(reader, 1)  # the child runs by now
print(os.getpid(), flush=True)
time.sleep(60)
"""


def holding(folder: Path, how: str = "alone") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert int(process.stdout.readline()) == process.pid
    return process


@pytest.mark.parametrize("how", ["alone", "fork"])
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path, how: str) -> None:
    process = holding(tmp_path / "run", how)
    with pytest.raises(RunError, match=rf"is in use by another process, {process.pid} on '.+', since 20"):
        RunJournal(tmp_path / "run")
    process.kill()
    process.wait()  # a child of it lives on, and keeps the pipe, but not the lease
    process.stdout.close()
    RunJournal(tmp_path / "run").close()
    assert os.listdir(tmp_path / "run") == ["events.jsonl"]


def test_a_second_one_in_the_same_process_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    first = RunJournal(tmp_path)
    first(Event("warning", 3, {"message": "it goes on"}))
    with pytest.raises(RunError, match=r"in use by this process, since 20.*; finish\(\) or close\(\)"):
        RunJournal(tmp_path)
    first.close()
    RunJournal(tmp_path).close()


def test_a_journal_that_was_given_up_or_has_finished_holds_nothing(tmp_path: Path) -> None:
    cycle: list = [RunJournal(tmp_path)]
    cycle.append(cycle)
    del cycle
    second = RunJournal(tmp_path)
    facts = ("parameters", "flops", "training_flops", "growth_flops", "seconds", "grown")
    second(Event("run_finished", 3, dict.fromkeys(facts, 0)))
    third = RunJournal(tmp_path)
    second(Event("warning", 3, {"message": "late"}))
    third.close()
    assert [event.kind for event in read_events(tmp_path)] == ["run_finished", "warning"]


def test_a_folder_made_for_a_lease_goes_with_it(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "new", "wait")
    assert (tmp_path / "new" / LEASE_FILE).exists()
    lease.release()
    assert not (tmp_path / "new").exists()


def test_what_a_lease_says_may_be_damaged(tmp_path: Path) -> None:
    process = holding(tmp_path)
    (tmp_path / LEASE_FILE).write_text('{"pid": "x", "since": 1e400}')
    with pytest.raises(RunError, match="in use by another process, which does not say which"):
        RunJournal(tmp_path)
    process.kill()
    process.communicate()


def test_a_link_in_the_lease_s_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / LEASE_FILE).symlink_to(tmp_path / "mine")
    with pytest.warns(RuntimeWarning, match="cannot lock the run folder") as told:
        journal = RunJournal(tmp_path)
    assert told[0].filename == __file__
    facts = ("parameters", "flops", "training_flops", "growth_flops", "seconds", "grown")
    journal(Event("run_finished", 3, dict.fromkeys(facts, 0)))
    journal.close()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_run_s_beginnings_say_which_run_and_which_settings(tmp_path: Path) -> None:
    facts = ("model", "parameters", "flops", "sites", "refused", "budget", "seed", "steps")
    with RunJournal(tmp_path, run="beef", config="0123") as journal:
        journal(Event("run_started", 0, dict.fromkeys(facts, 0)))
        journal.run = "feed"
        journal(Event("resumed", 5, {"step": 5, "name": "step-00000005"}))
    first, second = read_events(tmp_path)
    assert (first.data["run"], first.data["config"]) == ("beef", "0123")
    assert second.data["run"] == "feed"
