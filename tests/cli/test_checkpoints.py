"""``esper checkpoints``: lists, verifies, prunes and exports; damage is named and ends with 1."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from esper.checkpoint import FolderStorage
from esper.checkpoint.format.manifest import canonical, digest
from esper.checkpoint.format.reader import read
from esper.cli import app
from esper.saving.save import load_into
from tests.checkpoint.killable import host

ONE, TWO = "step-00000042", "step-00000063"
GOLDEN = Path(__file__).parents[1] / "checkpoint" / "golden"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(GOLDEN, run / "checkpoints")
    return run


@pytest.fixture
def run():
    """Run the command in this process: each of its own would import torch again."""

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        line = list(map(str, arguments))
        result = CliRunner().invoke(app, line)
        return subprocess.CompletedProcess(line, result.exit_code, result.stdout, result.stderr)

    return command


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def copy_as(folder: Path, step: int, loss: float) -> None:
    """Make another sound checkpoint, of another step."""
    target = folder / "checkpoints" / f"step-{step:08d}"
    shutil.copytree(folder / "checkpoints" / ONE, target)
    facts = json.loads((target / "manifest.json").read_bytes())
    facts |= {"step": step, "metrics": {"loss": loss}}
    facts.pop("digest")
    sealed = canonical({**facts, "digest": digest([canonical(facts)])})
    (target / "manifest.json").write_bytes(sealed)


def test_list_shows_every_checkpoint(folder: Path, run) -> None:
    flip(folder / "checkpoints" / TWO / "manifest.json")
    for place in (folder, folder / "checkpoints"):
        ran = run("checkpoints", "list", place)
        assert ran.returncode == 0, ran.stderr
        _, first, second = ran.stdout.splitlines()
        assert first.startswith(ONE)
        assert "STABILISING" in first
        assert "loss 0.5" in first
        assert second.startswith(f"{TWO}  damaged: ")
    rows = json.loads(run("checkpoints", "list", folder, "--json").stdout)
    assert [(row["name"], row["damaged"] is None) for row in rows] == [(ONE, True), (TWO, False)]
    assert rows[0]["step"] == 42
    assert rows[0]["code"].keys() == {"esper", "torch", "numpy", "python"}


def test_verify_names_damaged_parts(folder: Path, run) -> None:
    ran = run("checkpoints", "verify", folder)
    assert ran.returncode == 0
    assert ran.stdout.splitlines()[1:] == [
        f"{ONE}  sound",
        f"{TWO}  sound",
        f"2 of 2 checkpoints in {folder / 'checkpoints'} are sound",
    ]
    flip(folder / "checkpoints" / ONE / "tensors.safetensors")
    (folder / "checkpoints" / ONE / "genome.json").unlink()
    ran = run("checkpoints", "verify", folder)
    assert ran.returncode == 1
    assert f"{ONE}  damaged" in ran.stdout.splitlines()
    assert "genome.json: No such file" in ran.stdout
    assert f"{ONE}: tensors.safetensors is damaged" in ran.stdout
    assert "1 of 2 checkpoints" in ran.stdout
    told = json.loads(run("checkpoints", "verify", folder, "--json").stdout)
    assert told["verified"] == [TWO]
    assert told["damaged"][ONE].keys() == {"genome.json", "tensors.safetensors"}
    assert run("checkpoints", "verify", folder, "63").returncode == 0
    assert run("checkpoints", "verify", folder, ONE).returncode == 1


def test_what_is_not_there_is_bad_input(folder: Path, run, tmp_path: Path) -> None:
    ran = run("checkpoints", "verify", folder, "7")
    assert ran.returncode == 2
    assert ONE in ran.stderr
    ran = run("checkpoints", "list", tmp_path / "none")
    assert ran.returncode == 2
    assert "no folder" in ran.stderr
    (tmp_path / "empty").mkdir()
    assert "no checkpoints in" in run("checkpoints", "list", tmp_path / "empty").stdout
    assert "no checkpoints in" in run("checkpoints", "verify", tmp_path / "empty").stdout
    assert run("checkpoints", "export", tmp_path / "empty", tmp_path / "out").returncode == 2
    ran = run("checkpoints", "list", "nowhere://bucket/prefix")
    assert ran.returncode == 2
    assert "'nowhere'" in ran.stderr


@pytest.mark.parametrize("name", ["9" * 5000, "²", "٣", "-1", "", "..", "x" * 5000])
def test_a_name_that_is_none_is_bad_input(folder: Path, run, tmp_path: Path, name: str) -> None:
    for line in (("export", folder, tmp_path / "out", f"--name={name}"), ("verify", folder, "--", name)):
        ran = run("checkpoints", *line)
        assert ran.returncode == 2, ran.stderr
        assert "no checkpoint " in ran.stderr
        assert len(ran.stderr) < 300


def test_prune_keeps_the_newest_sound_and_the_best(folder: Path, run) -> None:
    copy_as(folder, 50, 0.1)
    copy_as(folder, 70, 0.3)
    flip(folder / "checkpoints" / "step-00000070" / "genome.json")
    arguments = ("checkpoints", "prune", folder, "--keep", 1, "--best", "loss:min")
    dry = json.loads(run(*arguments, "--dry-run", "--json").stdout)
    assert (dry["deleted"], dry["damaged"]) == ([ONE], ["step-00000070"])
    assert "would be deleted" in run(*arguments, "--dry-run").stdout
    assert (folder / "checkpoints" / ONE).exists()
    ran = run(*arguments)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        f"{ONE}  deleted",
        "step-00000050  kept             the best",
        f"{TWO}  kept",
        "step-00000070  kept             damaged",
        f"1 of 4 checkpoints in {folder / 'checkpoints'} are gone",
    ]
    assert not (folder / "checkpoints" / ONE).exists()
    assert run("checkpoints", "prune", folder, "--keep", 0).returncode == 2
    assert run("checkpoints", "prune", folder, "--best", "loss").returncode == 2


def test_an_export_is_a_saved_model(folder: Path, run, tmp_path: Path) -> None:
    """Loaded with Esper and with torch alone."""
    flip(folder / "checkpoints" / TWO / "state.json.zlib")
    ran = run("checkpoints", "export", folder, tmp_path / "model")
    assert ran.returncode == 0, ran.stderr
    assert "the model of step-00000042" in ran.stdout
    assert "state.json.zlib is damaged" in ran.stdout
    spec = importlib.util.spec_from_file_location("rebuild", tmp_path / "model" / "rebuild.py")
    rebuild = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rebuild)
    alone = rebuild.load(host()).state_dict()
    loaded = load_into(host(), tmp_path / "model").state_dict()
    kept = read(FolderStorage(folder / "checkpoints"), ONE).state["modules"][""]["state"]
    assert alone.keys() == loaded.keys() == kept.keys()
    assert all(torch.equal(v, alone[k]) and torch.equal(v, loaded[k]) for k, v in kept.items())
    again = run("checkpoints", "export", folder, tmp_path / "model", "--name", 42)
    assert again.returncode == 2
    assert "exists; choose another folder" in again.stderr
