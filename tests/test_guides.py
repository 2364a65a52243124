"""CONTRIBUTING.md's guides: every file in them is installed as another package would, and holds its suite."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import benchmarks
import esper
from esper.blueprints import CATALOGUE
from esper.blueprints.kernel import initial_weights
from esper.blueprints.representative import representative
from esper.blueprints.sizes import example_shapes
from esper.cli.bench import benches
from esper.config import load_config
from esper.nissa.detectors import DETECTORS
from esper.registry import Registry
from esper.storage.address import storage_at
from esper.tamiyo.controller import BANDITS, Tamiyo
from esper.testing.bandits import check_bandit
from esper.testing.blueprint import check
from esper.testing.detectors import check_detector
from esper.testing.storages import check_storage
from esper.tezzeret.pipelines import PIPELINES
from esper.tezzeret.verify import example_input, verify
from tests.cli.test_chaos import HOST, RECIPE

ROOT = Path(__file__).parent.parent
GUIDE = re.compile(
    r"^### [^\n]*: `(?P<path>[^`]+)`\n\n```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
FILES = {m["path"]: m["code"] for m in GUIDE.finditer((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))}
MOST = 40  # lines of a change

Install = Callable[[str, str], str]  # folder of a guide's file, group -> the name


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Lay down what an installer would: the guide's file, and a distribution with its entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def lay_down(folder: str, group: str) -> str:
        path, code = next((Path(path), code) for path, code in FILES.items() if path.startswith(folder))
        module, name = f"added_{path.stem}", path.stem
        (tmp_path / f"{module}.py").write_text(code, encoding="utf-8")
        exported = re.search(r'^__all__ = \["(\w+)"\]$', code, re.MULTILINE)
        assert exported is not None
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{exported[1]}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)
        return name

    return lay_down


def found(registry: Registry, name: str) -> object:
    assert name in registry.names()
    return registry.get(name)


def test_each_guide_is_one_new_file_of_at_most_forty_lines() -> None:
    folders = {str(Path(path).parent) for path in FILES}
    assert folders == {
        "benchmarks",
        "src/esper/blueprints/catalogue",
        "src/esper/chaos/faults",
        "src/esper/nissa/detectors",
        "src/esper/tamiyo/bandits",
        "src/esper/tezzeret/pipelines",
        "src/esper/urza/blobs",
    }
    assert {path: lines for path, code in FILES.items() if (lines := len(code.splitlines())) > MOST} == {}
    assert [path for path in FILES if (ROOT / path).exists()] == []


def test_a_bandit(install: Install) -> None:
    name = install("src/esper/tamiyo/bandits", "esper.bandits")
    assert all(held for _, held in check_bandit(found(BANDITS, name)))  # type: ignore[arg-type]
    config = load_config({"bandit": name})
    assert type(Tamiyo(config, 100, 4).selector.bandit).__name__ == "Greedy"


def test_a_blueprint(install: Install) -> None:
    graph = found(CATALOGUE, install("src/esper/blueprints/catalogue", "esper.blueprints"))
    results = check(graph)  # type: ignore[arg-type]
    assert len({one.name for one in results}) > 5
    assert [one for one in results if one.passed is False] == []


def test_a_pipeline(install: Install) -> None:
    chosen = PIPELINES.get(install("src/esper/tezzeret/pipelines", "esper.pipelines"))
    graph = CATALOGUE.get("conv3x3")
    program = graph.lower(representative(graph)[0], 6)
    x = example_input(program.signature, example_shapes(program.signature)[0][0])
    made = verify(program, initial_weights(program, 0), chosen.compile(program, x), x, trains=chosen.trains)
    assert made.output_error <= made.tolerance


def test_a_detector(install: Install) -> None:
    name = install("src/esper/nissa/detectors", "esper.detectors")
    chosen = found(DETECTORS, name)
    assert [told for told in check_detector(chosen) if not told[1]] == []  # type: ignore[arg-type]
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    probe = [(torch.randn(32, 4), torch.randn(32, 2))]
    growth = esper.grow(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        lambda model, batch: torch.nn.functional.mse_loss(model(batch[0]), batch[1]),
        probe=probe,
        steps=100,
        growth="incubate",
        config={"governor": {"enabled": True, "detector": name}},
    )
    assert growth.run.orchestrator.guard.governor.detector.__class__ is chosen  # type: ignore[attr-defined]


def test_a_blob_store(install: Install, tmp_path: Path) -> None:
    name = install("src/esper/urza/blobs", "esper.blobs")
    places = (tmp_path / f"{number}.db" for number in range(99))
    assert [
        told for told in check_storage(lambda: storage_at(f"{name}://{next(places)}")) if not told[1]
    ] == []


def test_a_fault(install: Install, tmp_path: Path) -> None:
    name = install("src/esper/chaos/faults", "esper.faults")
    (tmp_path / "host.py").write_text(HOST)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**RECIPE, "epochs": 4}))
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "esper",
        "chaos",
        "small.yaml",
        "--faults",
        name,
        "--json",
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (row,) = json.loads(ran.stdout)["faults"]
    assert (row["fault"], row["survived"], row["equal"]) == (name, True, True)


def test_a_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, code = next((path, code) for path, code in FILES.items() if path.startswith("benchmarks/"))
    (tmp_path / Path(path).name).write_text(code, encoding="utf-8")
    assert list(benches(tmp_path)) == ["import-cost"]
    monkeypatch.setattr(benchmarks, "__path__", [*benchmarks.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "benchmarks.import_cost", raising=False)
    bench = importlib.import_module("benchmarks.import_cost")
    assert bench.main(["--seeds", "1", "--out", str(tmp_path / "out")]) in (0, 1)
    written = json.loads((tmp_path / "out" / "import-cost.json").read_text())
    assert written["promises"][0]["measured"] > 0
