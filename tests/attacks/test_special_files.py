"""A17: links, pipes, devices, folders and files without end in the place of a file are refused at once."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from esper.checkpoint import FolderStorage
from esper.config import load_config
from esper.errors import EsperError
from esper.kasmina.branches.choice import read_graph
from esper.nissa.run.journal import EVENTS_FILE, RunJournal, read_events
from esper.nissa.views.report import COMPARISON_FILE, read_comparison
from esper.saving.save import FILES, load_into, save

ENDLESS = 1 << 43  # bytes of a file that is all holes


def pipe(path: Path) -> None:
    os.mkfifo(path)


def linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def nowhere(path: Path) -> None:
    path.symlink_to("nothing")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # an address has 108 bytes at most
        server.bind(path.name)
        os.chdir(here)


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(ENDLESS)


PUT = {one.__name__: one for one in (pipe, linked_pipe, zeros, folder, loop, nowhere, listening, endless)}


def saved(place: Path) -> Path:
    return save(nn.Linear(2, 2), [], place / "grown", card={})


def journal(place: Path) -> Path:
    RunJournal(place / "run").close()
    return place / "run" / EVENTS_FILE


READ: dict[str, tuple[Callable[[Path], Path], Callable[[Path], object]]] = {
    "a config": (lambda place: place / "config.yaml", load_config),
    "a blueprint": (lambda place: place / "mine.json", read_graph),
    "a comparison": (lambda place: place / COMPARISON_FILE, lambda path: read_comparison(path.parent)),
    "a journal that is read": (journal, lambda path: read_events(path.parent)),
    "a journal that is begun": (journal, lambda path: RunJournal(path.parent)),
    **{
        f"a saved {name}": (
            lambda place, name=name: saved(place) / name,
            lambda path: load_into(nn.Linear(2, 2), path.parent),
        )
        for name in sorted(FILES)
    },
}


@pytest.mark.parametrize("what", PUT)
@pytest.mark.parametrize("reader", READ)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, reader: str, what: str) -> None:
    place, read = READ[reader]
    path = place(tmp_path)
    path.unlink(missing_ok=True)
    PUT[what](path)
    begun = time.monotonic()
    with pytest.raises(EsperError) as caught:
        read(path)
    assert time.monotonic() - begun < 5
    assert len(str(caught.value)) < 2000
    assert os.path.lexists(path)


@pytest.mark.parametrize("what", sorted(PUT.keys() - {"endless"}))  # the length of a part is known
def test_a_part_of_a_checkpoint(tmp_path: Path, what: str) -> None:
    storage = FolderStorage(tmp_path)
    storage.put("step-00000001", {"part": [b"x"]})
    path = tmp_path / "step-00000001" / "part"
    path.unlink()
    PUT[what](path)
    with pytest.raises(EsperError):
        storage.get("step-00000001", "part")
