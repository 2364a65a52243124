"""A run goes on by what it was asked to do, has its folder for itself, and ends with a checkpoint."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from esper.checkpoint import FolderStorage
from esper.checkpoint.format.reader import read
from esper.nissa.run.journal import read_events

HOST = """
import os
import random
import time
import numpy
import torch
from torch import nn


def build(hidden=2):
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def data(count=20, seed=0, size=32):
    print("drawn", random.random(), numpy.random.rand(), torch.rand(1).item())
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x = torch.randn(size, 6, generator=draw)
        made.append((x, x[:, :3].abs().argmax(1)))
    return {"train": made, "probe": made[:8]}


def loss(model, batch):
    time.sleep(float(os.environ.get("SLOW", "0")) if model.training else 0)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
RECIPE: dict[str, Any] = {
    "model": "host:build",
    "data": "host:data",
    "loss": "host:loss",
    "optimizer": {"call": "torch.optim:Adam", "arguments": {"lr": 0.01}},
    "epochs": 400,
    "growth": {"growth": "off"},
}
SLOW = {**os.environ, "SLOW": "0.01", "COLUMNS": "500"}


def write(folder: Path, **changes: Any) -> Path:
    (folder / "host.py").write_text(HOST)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def started(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "esper", "train", "recipe.yaml", "--plain", "--run-dir", "run", *more]
    return subprocess.Popen(
        command, cwd=folder, env=SLOW, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kept(folder: Path) -> list[str]:
    return FolderStorage(folder / "run" / "checkpoints").names()


def until(holds: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """A folder with a run that SIGTERM has ended."""
    write(tmp_path)
    process = started(tmp_path, "--resume", "auto")
    until(lambda: kept(tmp_path))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return tmp_path


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_a_run_with_a_checkpoint_and_its_usual_status(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    process = started(tmp_path, "--resume", "auto")
    until(lambda: kept(tmp_path))
    first, sent = kept(tmp_path)[-1], signal.Signals[name]
    time.sleep(0.3)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if sent is signal.SIGINT else -sent)
    last = kept(tmp_path)[-1]
    assert last > first
    assert f"the same command with --resume auto goes on from {last}" in said
    assert "Traceback" not in said


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    write(tmp_path)
    first = started(tmp_path, "--resume", "auto")
    until(lambda: kept(tmp_path))
    second = started(tmp_path, "--resume", "auto")
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"esper: run is in use by another process, {first.pid} on " in said
    assert first.poll() is None
    first.kill()
    first.communicate()
    events = read_events(tmp_path / "run")
    assert [event.kind for event in events].count("run_started") == 1


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gets_on(tmp_path: Path) -> None:
    write(tmp_path)
    steps = []
    for _ in range(3):
        process = started(tmp_path, "--resume", "auto")
        before = kept(tmp_path)
        until(lambda before=before: kept(tmp_path)[-1:] > before[-1:])
        process.kill()
        process.communicate()
        steps.append(kept(tmp_path)[-1])
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_a_used_folder_is_refused_and_fresh_moves_it_aside(stopped: Path) -> None:
    refused = started(stopped)
    _, said = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "run holds a run already (its newest checkpoint is step-" in said
    assert "--resume auto; to begin anew: --fresh" in said
    held = kept(stopped)
    write(stopped, epochs=1)
    anew = started(stopped, "--fresh")
    _, said = anew.communicate(timeout=60)
    assert anew.returncode == 0, said
    (aside,) = stopped.glob("run.*Z")
    assert f"the earlier run is in {aside} now" in said
    assert FolderStorage(aside / "checkpoints").names() == held
    assert read_events(stopped / "run")[0].step == 0


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "rate": (
        {"optimizer": {"call": "torch.optim:Adam", "arguments": {"lr": 0.5}}},
        "optimizer.arguments.lr: 0.01 → 0.5",
    ),
    "seed": ({"seed": 9}, "seed: 0 → 9"),
    "data": (
        {"data": {"call": "host:data", "arguments": {"count": 30}}},
        "data.arguments.count: not given → 30; loaded.train.batches: 20 → 30",
    ),
    "loss": ({"loss": "cross_entropy"}, "loss.call: 'host:loss' → 'cross_entropy'"),
    "growth": (
        {"growth": {"growth": "off", "budget": {"growth_events": 2}}},
        "growth.budget.growth_events: not given → 2",
    ),
    "model": (
        {"model": {"call": "host:build", "arguments": {"hidden": 3}}},
        "this Sequential does not fit it: its '0.weight' is [3, 6], and [2, 6] is needed",
    ),
}


@pytest.mark.slow
def test_changed_code_is_named(stopped: Path) -> None:
    with (stopped / "host.py").open("a") as file:
        file.write("\nMORE = 1\n")
    _, said = started(stopped, "--resume", "auto").communicate(timeout=60)
    assert "the code of host.py: " in said
    assert "--override" in said


def test_override_makes_the_new_settings_hold_and_says_so(stopped: Path) -> None:
    write(
        stopped,
        epochs=1,
        seed=4,
        optimizer={"call": "torch.optim:Adam", "arguments": {"lr": 0.25, "weight_decay": 0.5}},
    )
    process = started(stopped, "--resume", "auto", "--override")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "optimizer.arguments.lr: 0.01 → 0.25" in said
    assert "epochs was 400 and is 1" in said
    state = read(FolderStorage(stopped / "run" / "checkpoints"), kept(stopped)[-1]).state
    (group,) = state["optimizers"]["optimizer"]["groups"]
    assert (group["settings"]["lr"], group["settings"]["weight_decay"]) == (0.25, 0.5)


def test_a_run_that_has_ended_has_a_last_checkpoint_and_the_same_id_throughout(stopped: Path) -> None:
    write(stopped, epochs=2)
    process = started(stopped, "--resume", "auto")
    process.communicate(timeout=60)
    assert process.returncode == 0
    storage = FolderStorage(stopped / "run" / "checkpoints")
    checkpoints = [read(storage, name) for name in storage.names()]
    assert checkpoints[-1].state["batches"]["index"] == 0
    assert checkpoints[-1].manifest.step >= 40
    events = read_events(stopped / "run")
    ids = {one.manifest.summary["run"] for one in checkpoints}
    assert ids == {next(event.data["run"] for event in events if event.kind == "resumed")}
    assert ids == {next(event.data["run"] for event in events if event.kind == "run_started")}


def test_one_seed_is_everyone_s(tmp_path: Path) -> None:
    write(tmp_path, epochs=1, seed=3)
    drawn = []
    for number in range(2):
        out, _ = started(tmp_path, "--run-dir", f"run{number}").communicate(timeout=60)
        drawn.append([line for line in out.splitlines() if line.startswith("drawn")])
    assert drawn[0] == drawn[1] != []


@pytest.mark.parametrize("seed", [-1, 2**32, True, 1.5])
def test_a_seed_that_is_none_is_refused(tmp_path: Path, seed: Any) -> None:
    write(tmp_path, seed=seed)
    process = started(tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "seed: Input should be" in said


def test_checkpoints_as_the_config_says(tmp_path: Path) -> None:
    write(tmp_path, epochs=2, checkpoints={"every_steps": 8, "keep": 2})
    process = started(tmp_path, "--json")
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert kept(tmp_path) == ["step-00000032", "step-00000040"]
    assert json.loads(out[out.index("{") :])["steps"] == 40
    write(tmp_path, checkpoints={"every_steps": 8, "every_seconds": 3})
    _, said = started(tmp_path, "--fresh").communicate(timeout=60)
    assert "every_seconds and every_steps are both given; give one of them" in said
