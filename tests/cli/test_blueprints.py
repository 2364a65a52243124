"""What may grow, on the command line: the list, one blueprint, and the proof of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper.blueprints import CATALOGUE
from esper.cli.blueprint_facts import find
from esper.errors import BlueprintError, RegistryError
from tests.cli.conftest import Command

OWN = {
    "name": "mine",
    "summary": "two layers",
    "source": "here",
    "layouts": ["vector"],
    "ports": ["parallel"],
    "nodes": [
        {"name": "inner", "op": "affine", "inputs": ["x"], "attributes": {"outputs": "hidden"}},
        {"name": "active", "op": "tanh", "inputs": ["inner"]},
        {"name": "out", "op": "affine", "inputs": ["active"], "attributes": {"outputs": "outputs"}},
    ],
    "output": "out",
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps({**OWN, **changes}), encoding="utf-8")
    return path


def test_the_list_names_every_blueprint(esper: Command) -> None:
    rows = json.loads(esper("blueprints", "list", "--json").stdout)
    assert [row["name"] for row in rows] == CATALOGUE.names()
    assert all(row["parameters"] > 0 and row["summary"] for row in rows)
    lines = esper("blueprints", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *CATALOGUE.names()]


def test_one_is_shown_as_lines_with_its_costs(esper: Command) -> None:
    shown = esper("blueprints", "show", "low_rank", "--hidden", 3).stdout
    assert "down = affine(x, bias=False, outputs=hidden)" in shown
    assert "out = affine(down, outputs=outputs)   # starts at zero" in shown
    assert "can be merged into a layer" in shown
    assert "vector parallel 12→8: 68 parameters, 120 FLOPs for [1, 12]" in shown
    facts = json.loads(esper("blueprints", "show", "low_rank", "--json").stdout)
    assert facts["digest"] == CATALOGUE.get("low_rank").digest()
    assert facts["costs"][0]["parameters"] == 128


def test_a_sound_file_is_proven(esper: Command, tmp_path: Path) -> None:
    ran = esper("blueprints", "check", write(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert "pass  identity" in ran.stdout
    assert "mine: 10 checks, 0 failed" in ran.stdout


def test_an_unsound_one_fails_with_the_reason(esper: Command, tmp_path: Path) -> None:
    loud = {"name": "loud", "op": "scale", "inputs": ["x"], "attributes": {"by": 5000}}
    last = {"name": "out", "op": "affine", "inputs": ["loud"], "attributes": {"outputs": "outputs"}}
    path = write(tmp_path, nodes=[loud, last])
    ran = esper("blueprints", "check", path)
    assert ran.returncode == 1
    assert "FAIL  gradients" in ran.stdout
    found = json.loads(esper("blueprints", "check", path, "--json").stdout)
    assert found["passed"] is False


def test_a_file_that_is_no_blueprint_is_bad_input(esper: Command, tmp_path: Path) -> None:
    ran = esper("blueprints", "check", write(tmp_path, output="active"))
    assert ran.returncode == 2
    assert "node 'out' (affine): it is dead" in ran.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"\xff\xfe", "cannot read the blueprint"), (b" " * 5_000_000, "more than 1,048,576 bytes")],
    ids=["bytes", "giant"],
)
def test_a_file_is_read_with_care(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(BlueprintError, match=reason):
        find(str(tmp_path / "mine.json"))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BlueprintError, match="No such file"):
        find(str(tmp_path / "none.json"))
    with pytest.raises(RegistryError, match="did you mean 'gated'"):
        find("gatd")


def test_time_runs_out_aloud(esper: Command) -> None:
    ran = esper("blueprints", "check", "bottleneck", "--seconds", 1)
    assert ran.returncode == 1
    assert "stopped after 1 s; the rest is not proven" in ran.stdout
