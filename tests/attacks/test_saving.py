"""A save that is cut short at any call leaves the old folder or the new one, and no trace."""

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.errors import SavedModelError, StateError
from esper.saving.save import load_into, save
from tests.cases.loops import narrow

WORKER = Path(__file__).with_name("saves_cut_short.py")


@pytest.mark.parametrize("before", ["nothing", "earlier"])
@pytest.mark.parametrize("fault", ["kill", "interrupt", "full"])
def test_a_save_that_ends_at_any_call_leaves_a_whole_folder(
    fault: str, before: str, count: Callable[..., None]
) -> None:
    done = subprocess.run(
        [sys.executable, str(WORKER), fault, before], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    count(told["calls"], len(told["faults"]))
    assert told["faults"] == []
    assert told["calls"] > 15


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_random_moments_of_growth_save_lose_nothing(
    kills: int, tmp_path: Path, count: Callable[..., None]
) -> None:
    paths = os.pathsep.join(p for p in sys.path if p)
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.attacks.killed_while_saving", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    draw, lost = random.Random(0), []
    for kill in range(kills):
        name = f"run{kill}"
        worker.stdin.write(f"{name}\n")
        pid, ended = int(worker.stdout.readline()), tmp_path / f"{name}.ended"
        while not ended.exists():  # one save at least is there to be lost
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert worker.stdout.readline() == "over\n"
        first, last = (int((tmp_path / f"{name}.{kind}").read_text() or -1) for kind in ("ended", "begun"))
        net = load_into(narrow(), tmp_path / name)
        known = {first, first + 1} if first > 0 else {last - 1, last}  # a note may be cut short, too
        if int(net[2].bias[0]) not in known or list(tmp_path.glob(f".{name}.*")):
            lost.append((kill, first, last, float(net[2].bias[0])))
    worker.stdin.close()
    assert worker.wait() == 0
    worker.stdout.close()
    count(kills, len(lost))
    assert lost == []


def left_between_two_renames(folder: Path) -> Path:
    """Leave it as a killed writer does: the old folder has lost its name, the new one has none yet."""
    token = "0123456789abcdef"
    old, ready = (folder.with_name(f".grown.{token}.{kind}") for kind in ("old", "ready"))
    save(nn.Linear(2, 3), [], folder.with_name("new"), card={}).rename(ready)
    folder.rename(old)
    return ready


def test_a_reader_finds_the_newest_whole_folder_between_two_renames(tmp_path: Path) -> None:
    folder = save(nn.Linear(2, 2), [], tmp_path / "grown", card={})
    left_between_two_renames(folder)
    load_into(nn.Linear(2, 3), folder)
    assert os.listdir(tmp_path) == ["grown"]


def test_a_reader_leaves_a_writer_at_work_alone(tmp_path: Path) -> None:
    folder = save(nn.Linear(2, 2), [], tmp_path / "grown", card={})
    ready = left_between_two_renames(folder)
    writer = os.open(ready, os.O_RDONLY)
    fcntl.flock(writer, fcntl.LOCK_EX)
    load_into(nn.Linear(2, 3), folder)
    assert ready.exists()
    os.close(writer)


def test_what_is_no_earlier_save_is_not_replaced(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    whole = save(net, [], tmp_path / "whole", card={})
    (tmp_path / "link").symlink_to(whole)
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "like" / "card.md").mkdir(parents=True)
    (tmp_path / "like" / "card.md" / "mine").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "card.md").write_text("mine")
    for name, message in {
        "link": f"link is a link; give the folder it leads to, {whole}",
        "file": "file exists and is no folder",
        "pipe": "pipe exists and is no folder",
        "like": "like exists and is not just an earlier save",
        "notes": "notes exists and is not just an earlier save",
        "nul\0": "embedded null",
    }.items():
        with pytest.raises(StateError, match=message):
            save(net, [], tmp_path / name, card={})
    assert (tmp_path / "like" / "card.md" / "mine").exists()
    (tmp_path / "empty").mkdir()
    load_into(net, save(net, [], tmp_path / "empty", card={}))


def test_the_folder_one_stands_in_can_be_saved_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save(nn.Linear(2, 2), [], ".", card={})
    load_into(nn.Linear(2, 2), tmp_path / "here")


def test_an_error_without_the_system_s_words_is_still_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(handle: int) -> None:
        raise OSError("no quota")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StateError, match="no quota; nothing was changed there"):
        save(nn.Linear(2, 2), [], tmp_path / "grown", card={})


def test_sparse_and_meta_buffers_are_refused_by_name(tmp_path: Path) -> None:
    for buffer, what in ((torch.eye(3).to_sparse(), "sparse_coo"), (torch.empty(3, device="meta"), "meta")):
        net = nn.Linear(2, 2)
        net.register_buffer("odd", buffer)
        with pytest.raises(StateError, match=f"cannot save 'odd', a .*{what}"):
            save(net, [], tmp_path / "grown", card={})
    with pytest.raises(SavedModelError, match="not a saved model"):
        load_into(nn.Linear(2, 2), tmp_path / "grown")
