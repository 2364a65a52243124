"""The examples run as a user runs them: as commands, on their real data."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import esper

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_a_config_trains_and_its_saved_model_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "examples"
    shutil.copytree(EXAMPLES, here, ignore=shutil.ignore_patterns("__pycache__"))
    config = here / f"{name}.yaml"
    recipe = yaml.safe_load(config.read_text()) | {"epochs": 6}
    config.write_text(yaml.safe_dump(recipe))

    done = run(
        "-m", "esper", "train", str(config), "--run-dir", str(tmp_path / "run"), "--json", folder=tmp_path
    )

    totals = json.loads(done.stdout)
    assert "was put back" not in (tmp_path / "run" / "events.jsonl").read_text()  # what passes, materialises
    monkeypatch.syspath_prepend(here)
    models, data = runpy.run_path(str(here / "models.py")), runpy.run_path(str(here / "data.py"))
    plain = models[recipe["model"]["call"].split(":")[1]](**recipe["model"]["arguments"])
    model = esper.load_into(plain, totals["model"])
    assert sum(p.numel() for p in model.parameters()) == totals["parameters_after"]
    batches = data[recipe["data"]["call"].split(":")[1]](**recipe["data"]["arguments"])
    inputs, targets = next(iter(batches["val"]))
    assert model.eval()(inputs).shape == (len(targets), int(targets.max()) + 1)


def test_the_plain_loop_grows_a_network(tmp_path: Path) -> None:
    loop = EXAMPLES / "plain_loop.py"
    assert len(loop.read_text().splitlines()) <= 60
    printed = run(str(loop), folder=tmp_path).stdout
    assert "units more" in printed
    assert "growing cost" in printed
    accuracy = float(printed.split("accuracy ")[1].split()[0])
    assert accuracy > 0.8  # two hidden units alone reach 0.6 to 0.7


@pytest.mark.parametrize("name", ["digits", "wine"])
def test_the_parts_of_the_data_do_not_overlap_and_the_seed_fixes_them(name: str) -> None:
    make = runpy.run_path(str(EXAMPLES / "data.py"))[name]
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    rows = {
        part: {tuple(row.tolist()) for row in loader.dataset.tensors[0]} for part, loader in first.items()
    }
    assert not rows["train"] & rows["probe"] | rows["train"] & rows["val"] | rows["probe"] & rows["val"]
    for part, loader in first.items():
        assert torch.equal(loader.dataset.tensors[0], again[part].dataset.tensors[0])
    assert not torch.equal(first["val"].dataset.tensors[0], other["val"].dataset.tensors[0])
    list(again["probe"])  # reading the probe does not change the order of training
    for mine, theirs in zip(first["train"], again["train"], strict=True):
        assert torch.equal(mine[0], theirs[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_text", "vit_digits"])
def test_a_transformer_grows_and_beats_its_twin_best_rate_against_best_rate(
    name: str, tmp_path: Path
) -> None:
    found = json.loads(run(str(EXAMPLES / f"{name}.py"), "--json", folder=tmp_path).stdout)
    best = {row["arm"]: row for row in found["rows"]}
    assert found["won"]
    assert best["grown"]["test_loss"] < best["twin"]["test_loss"]
    assert best["fixed"]["parameters"] == best["grown"]["parameters"] > best["twin"]["parameters"]
    assert found["grew"]


@pytest.mark.parametrize("name", ["gpt_text", "vit_digits"])
def test_the_parts_of_a_transformer_example_do_not_overlap(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    data = runpy.run_path(str(EXAMPLES / f"{name}.py"))["data"]
    first, again, other = data(1), data(1), data(2)
    parts = {"train": first.train, "probe": first.probe, "val": [first.val], "test": [first.test]}
    rows = {
        part: {tuple(row.flatten().tolist()) for x, _ in batches for row in x}
        for part, batches in parts.items()
    }
    for one, two in itertools.combinations(rows, 2):
        shared = [row for row in rows[one] & rows[two] if len(set(row)) > 5]  # rulers of tables repeat
        assert len(shared) <= len(rows[two]) // 200
    assert all(torch.equal(mine[0], theirs[0]) for mine, theirs in zip(first.train, again.train, strict=True))
    assert not torch.equal(first.train[0][0], other.train[0][0])
