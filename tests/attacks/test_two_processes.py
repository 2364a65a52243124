"""A2: whatever else wants a run's folder while it is held is refused in words, and the run in it goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from esper.checkpoint import CheckpointManager, Run
from esper.errors import EsperError
from esper.nissa.run.journal import RunJournal, read_events
from tests.cases.loops import Task, cross_entropy, narrow
from tests.cli.test_going_on import started, write
from tests.nissa.test_lease import holding


def grows(folder: Path) -> None:
    net, draw = narrow(), Task()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    esper.grow(net, optimizer, cross_entropy, probe=[draw(64)], steps=9, run_dir=folder)


def trains(folder: Path) -> None:
    net, draw = narrow(), Task()
    data = [draw() for _ in range(3)]
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    esper.Trainer(
        net, optimizer, cross_entropy, train=data, probe=data, epochs=1, growth="off", run_dir=folder
    ).fit()


WANT: dict[str, Callable[[Path], object]] = {
    "a journal": RunJournal,
    "esper.grow": grows,
    "a Trainer": trains,
}


@pytest.mark.parametrize("want", WANT)
@pytest.mark.parametrize("how", ["alone", "fork", "here"])
def test_a_held_folder_is_refused(tmp_path: Path, how: str, want: str) -> None:
    folder = tmp_path / "run"
    holder: Any = RunJournal(folder) if how == "here" else holding(folder, how)
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}
    with pytest.raises(EsperError, match="in use by"):
        WANT[want](folder)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before
    if isinstance(holder, RunJournal):
        holder.close()
    else:
        assert holder.poll() is None
        holder.kill()
        holder.wait()
        holder.stdout.close()
    WANT[want](folder)  # nobody holds it any longer


def test_checkpoints_have_one_writer(tmp_path: Path) -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    first = CheckpointManager(tmp_path, Run(net, optimizer))
    with pytest.raises(EsperError, match="in use by"):
        CheckpointManager(tmp_path, Run(net, optimizer))
    first.save(wait=True)
    first.close()
    CheckpointManager(tmp_path, Run(net, optimizer)).close()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--resume", "auto"), ("--fresh",)])
def test_esper_train_in_a_held_folder(tmp_path: Path, more: tuple[str, ...]) -> None:
    write(tmp_path)
    first = holding(tmp_path / "run")
    second = started(tmp_path, *more)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"esper: run is in use by another process, {first.pid} on " in said
    first.kill()
    first.communicate()
    assert read_events(tmp_path / "run") == []
