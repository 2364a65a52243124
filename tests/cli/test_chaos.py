"""Real faults in real runs of a small config, by the real command."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from esper.chaos.child import FAULTS
from esper.cli import app
from esper.cli.chaos import chosen, lines
from esper.errors import RegistryError

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks"
HOST = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(6, 1), nn.ReLU(), nn.Linear(1, 3))


def batches(count, seed):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x = torch.randn(32, 6, generator=draw)
        made.append((x, x[:, :3].abs().argmax(1)))
    return made


def data():
    return {"train": batches(20, 0), "probe": batches(8, 2)}
"""
RECIPE: dict[str, Any] = {
    "model": "host:build",
    "data": "host:data",
    "loss": "cross_entropy",
    "optimizer": {"call": "torch.optim:Adam", "arguments": {"lr": 0.01}},
    "epochs": 15,
    "growth": {"growth": "incubate"},  # a failing kernel needs one that is exposed
}
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "host.py").write_text(HOST)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def rehearsed(ran: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    return {row["fault"]: row for row in json.loads(ran.stdout)["faults"]}


def test_a_batch_of_nan_is_undone_and_told(esper: Command, config: Path, tmp_path: Path) -> None:
    ran = esper("chaos", config, "--faults", "nan-batch", "--run-dir", tmp_path / "kept", "--json")
    assert ran.returncode == 0, ran.stderr
    row = rehearsed(ran)["nan_batch"]
    assert row["survived"] is True
    assert row["steps_lost"] > 0
    assert row["equal"] is None
    assert row["reason"] == "the governor undid steps"
    assert "loss nonfinite: rollback" in row["what"]
    assert "chaos: nan_batch: a batch of NaN" in ran.stderr
    assert (tmp_path / "kept" / "nan_batch" / "run" / "events.jsonl").exists()


@pytest.mark.slow
def test_every_fault_that_comes_is_survived(esper: Command, config: Path) -> None:
    ran = esper("chaos", config, "--json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = rehearsed(ran)
    assert set(found) == set(FAULTS.names())
    assert all(row["survived"] for row in found.values()), found
    assert all(row["seconds"] > 0 for row in found.values())
    changed = {"nan_batch", "exploding_rate", "failing_kernel"}
    assert {name for name, row in found.items() if row["equal"]} == set(found) - changed
    assert all(found[name]["equal"] is None and found[name]["reason"] for name in changed)
    for name in ("kill", "kill_in_checkpoint", "flipped_checkpoint", "truncated_checkpoint", "lost_rank"):
        assert found[name]["steps_lost"] > 0
    assert "passed over" in found["flipped_checkpoint"]["what"]
    assert "culled" in found["failing_kernel"]["what"]


@pytest.mark.slow
def test_a_run_that_does_not_come_through_is_exit_1(esper: Command, config: Path) -> None:
    config.write_text(yaml.safe_dump({**RECIPE, "growth": {"governor": {"nonfinite": ["stop"]}}}))
    ran = esper("chaos", config, "--faults", "nan_batch")
    assert ran.returncode == 1
    assert re.search(r"^nan_batch +no ", ran.stdout, re.M)
    assert "the governor stopped the run" in ran.stdout
    assert "0 of 1 survived, 0 skipped" in ran.stdout


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_not_rehearsed(esper: Command, config: Path) -> None:
    (config.parent / "host.py").write_text(HOST.replace("nn.Linear(1, 3)", "nn.Linear(2, 3)"))
    ran = esper("chaos", config, "--faults", "kill")
    assert ran.returncode == 2
    assert "does not run even undisturbed" in ran.stderr


def test_runs_are_kept_in_a_folder(config: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    ran = CliRunner().invoke(app, ["chaos", str(config), "--run-dir", str(tmp_path / "pipe")])
    assert ran.exit_code == 2, ran.output
    assert "cannot keep runs in" in ran.stderr


def test_the_list_and_mistakes() -> None:
    run = CliRunner().invoke
    listed = json.loads(run(app, ["chaos", "--list", "--json"]).stdout)
    assert list(listed) == FAULTS.names()
    assert "kill -9" in run(app, ["chaos", "--list"]).stdout
    with pytest.raises(RegistryError, match="did you mean 'kill'"):
        chosen("kil", FAULTS.names())
    assert run(app, ["chaos", "--faults", "kil"]).exit_code == 2
    assert run(app, ["chaos", "none.yaml"]).exit_code == 2
    assert run(app, ["chaos"]).exit_code == 2


def test_the_table_tells_skipped_from_survived() -> None:
    row = {"seconds": None, "steps_lost": None, "equal": None, "reason": None, "what": "it [never] came"}
    rows = [
        {**row, "fault": "a", "survived": None},
        {**row, "fault": "b", "survived": True, "seconds": 1.5, "steps_lost": 7, "equal": True},
        {**row, "fault": "c", "survived": True, "equal": None, "reason": "steps were undone"},
    ]
    drawn = lines({"faults": rows, "steps": 9, "seconds": 1.0})
    assert drawn[1].split() == ["a", "skipped", "–", "–", "–"]
    assert drawn[2].split() == ["b", "yes", "1.50", "7", "yes"]
    assert drawn[3].endswith("– (steps were undone)")
    assert "2 of 2 survived, 1 skipped" in drawn
    assert "a: it [never] came" in drawn


def test_every_fault_has_a_runbook_that_rehearses_it() -> None:
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(RUNBOOKS.glob("*.md"))}
    named = {
        name
        for page in pages.values()
        for names in re.findall(r"esper chaos CONFIG --faults ([a-z_,]+)", page)
        for name in names.split(",")
    }
    assert named == set(FAULTS.names())
    for path, page in pages.items():
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page)
        assert all((path.parent / link).exists() for link in links), path
        if path.name != "index.md":
            assert path.stem in pages[RUNBOOKS / "index.md"]
            for part in ("**What is seen.**", "**What Esper did.**", "**What to do.**", "**Rehearse it.**"):
                assert part in page, path
