"""A1, A2: a folder stays the same one wherever the process goes, and a run that cannot begin leaves none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import esper
from esper.checkpoint import FolderStorage
from esper.errors import RunError, StateError
from esper.nissa.run.journal import RunJournal, read_events
from esper.storage.lease import LEASE_FILE
from esper.urza.folder import FolderStore
from tests.cases.loops import Task, cross_entropy, narrow
from tests.cli.test_going_on import started, write
from tests.nissa.test_lease import holding

DRAW = Task()
BATCHES = [DRAW() for _ in range(6)]
PROBE = [DRAW(64)]


def trainer(net: torch.nn.Module, optimizer: torch.optim.Optimizer, **given: Any) -> esper.Trainer:
    return esper.Trainer(
        net, optimizer, cross_entropy, train=BATCHES, probe=PROBE, epochs=1, every=2, **given
    )  # fmt: skip


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_run_stays_in_its_folders_where_the_process_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    net = narrow()
    made = trainer(net, torch.optim.Adam(net.parameters()), run_dir="run", checkpoints="kept")
    store = FolderStore("kernels")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made.fit()
    store.put("0" * 64, b"x")
    assert files(tmp_path / "elsewhere") == []
    assert "step-00000006" in os.listdir(tmp_path / "kept")
    assert read_events(tmp_path / "run")
    assert (tmp_path / "kernels").is_dir()
    left = [path for path in files(tmp_path) if path.endswith(LEASE_FILE)]
    assert left == []


def test_a_trainer_that_is_refused_its_checkpoints_leaves_nothing(tmp_path: Path) -> None:
    net = narrow()
    optimizer = torch.optim.Adam(net.parameters())
    lease = FolderStorage(tmp_path / "kept").lease()
    with pytest.raises(StateError, match="is in use by this process") as caught:
        trainer(net, optimizer, run_dir=tmp_path / "run", checkpoints=tmp_path / "kept")
    assert caught.tb is not None  # it holds what was half made, as where a notebook shows the error
    assert not (tmp_path / "run").exists()
    assert not optimizer._optimizer_step_post_hooks
    lease.release()
    trainer(net, optimizer, run_dir=tmp_path / "run", checkpoints=tmp_path / "kept").fit()
    assert "step-00000006" in os.listdir(tmp_path / "kept")


def test_a_lease_that_says_too_much_is_held_by_somebody(tmp_path: Path) -> None:
    process = holding(tmp_path)
    os.truncate(tmp_path / LEASE_FILE, 1 << 42)
    with pytest.raises(RunError, match="in use by another process, which does not say which"):
        RunJournal(tmp_path)
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_config_that_goes_elsewhere_is_trained_and_saved_where_it_was_asked(tmp_path: Path) -> None:
    write(tmp_path, epochs=2)
    (tmp_path / "elsewhere").mkdir()
    with (tmp_path / "host.py").open("a") as file:
        file.write("\nimport os\nos.chdir('elsewhere')\n")
    process = started(tmp_path, "--resume", "auto")
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert {"events.jsonl", "checkpoints", "model"} <= set(os.listdir(tmp_path / "run"))
    assert files(tmp_path / "elsewhere") == []
    (tmp_path / "host.py").write_text((tmp_path / "host.py").read_text() + "\n# changed\n")
    again = started(tmp_path, "--resume", "auto")
    _, told = again.communicate()
    assert again.returncode == 2, told  # code beside the config is still looked at
    assert "the code of host.py" in told
