"""Checkpoints whose digests are right and whose contents are not: passed over, never obeyed."""

import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import esper
from esper.checkpoint import CheckpointManager, FolderStorage, Run
from esper.checkpoint.contents.run import capture_run
from esper.checkpoint.format.checking import require_state
from esper.checkpoint.format.manifest import MANIFEST, STATE, TENSORS, canonical, digest
from esper.checkpoint.format.reader import read
from esper.cli import app
from esper.errors import CheckpointError, StateError

LAST = "step-00000002"


def train(folder: Path, steps: int) -> CheckpointManager:
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    manager = CheckpointManager(folder, Run(net, optimizer), every=1)
    manager.resume()
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        manager.step({"loss": 1.0})
        manager.writer.flush()
    return manager


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "kept"
    train(folder, 2).close()
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "kept"))


def seal(checkpoint: Path, **changes: Any) -> None:
    """Record digests of what lies there now, as whoever can write the folder could."""
    path = checkpoint / MANIFEST
    facts = {**json.loads(path.read_bytes()), **changes}
    del facts["digest"]
    for name in facts["parts"] if isinstance(facts["parts"], dict) else ():
        content = (checkpoint / name).read_bytes()
        facts["parts"][name] = {"size": len(content), "sha256": digest([content])}
    path.write_bytes(canonical({**facts, "digest": digest([canonical(facts)])}))


def state(value: bytes | Any) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
        (checkpoint / STATE).write_bytes(zlib.compress(text))
        seal(checkpoint)

    return write


def entry(name: str, value: Any) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        given = json.loads(zlib.decompress((checkpoint / STATE).read_bytes()))
        given["dict"][name] = value
        state(given)(checkpoint)

    return write


def within(*path: str, value: Any) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        given = json.loads(zlib.decompress((checkpoint / STATE).read_bytes()))
        *above, last = path
        holder = given
        for name in above:
            holder = holder["dict"][name]
        holder["dict"][last] = value
        state(given)(checkpoint)

    return write


def holes(part: str) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        os.truncate(checkpoint / part, 1 << 42)

    return write


def fact(**changes: Any) -> Callable[[Path], None]:
    return lambda checkpoint: seal(checkpoint, **changes)


def genome(text: str) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        (checkpoint / "genome.json").write_text(text)
        seal(checkpoint)

    return write


def bomb(chunk: bytes, times: int) -> Callable[[Path], None]:
    def write(checkpoint: Path) -> None:
        squeeze = zlib.compressobj(1)
        parts = [squeeze.compress(chunk) for _ in range(times)]
        (checkpoint / STATE).write_bytes(b"".join([*parts, squeeze.flush()]))
        seal(checkpoint)

    return write


def other_shape(checkpoint: Path) -> None:
    import safetensors.torch

    path = checkpoint / TENSORS
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["modules//state/weight"] = torch.zeros(1, 1)
    path.write_bytes(safetensors.torch.save(tensors))
    seal(checkpoint)


def evidence(checkpoint: Path) -> None:
    given = json.loads(zlib.decompress((checkpoint / STATE).read_bytes()))["dict"]
    own = {name: given[name] for name in ("others", "batches", "randomness")}
    facts = {"growth": None, "buffers": {"dict": {}}, "evidence": {"dict": {"coming": 1}}, **own}
    entry("processes", [{"dict": facts}])(checkpoint)


CASES: dict[str, Callable[[Path], None]] = {
    "a list": state([]),
    "an empty dict": state({"dict": {}}),
    "nested deeply": state(b"[" * 900 + b"]" * 900),
    "nested too deeply for JSON": state(b"[" * 100_000 + b"]" * 100_000),
    "steps of text": entry("steps", "x"),
    "steps before the beginning": entry("steps", -5),
    "steps of another checkpoint": entry("steps", 1),
    "no modules": entry("modules", None),
    "no optimizers": entry("optimizers", {"dict": {}}),
    "an optimizer of text": entry("optimizers", {"dict": {"optimizer": "x"}}),
    "no random streams": entry("randomness", {"dict": {}}),
    "a position of text": entry("batches", {"dict": {"epoch": "x", "index": 0}}),
    "growth of another kind": entry("growth", {"dict": {"version": 2}}),
    "buffers that are not there": within("modules", "", "owned", value=["none"]),
    "buffers of another kind": within("modules", "", "owned", value=3),
    "what processes knew of another kind": entry("processes", [1]),
    "what processes knew as text": entry("processes", "x"),
    "evidence of a run that never grew": evidence,
    "a manifest of holes": holes(MANIFEST),
    "a state of holes": holes(STATE),
    "tensors of holes": holes(TENSORS),
    "a tensor elsewhere": entry("config", {"tensor": "nope"}),
    "a tensor of another shape": other_shape,
    "a genome of brackets": genome("[" * 100_000),
    "a genome with a plan of its own": genome('{"format": 2, "base": {}, "plans": [{}]}'),
    "a genome with odd shapes": genome('{"format": 2, "base": {"weight": "x"}, "plans": []}'),
    "spaces": bomb(b" " * (1 << 20), 64),
    "empty lists": bomb(b"[]," * (1 << 18), 40),
    "no versions": fact(code=None),
    "metrics of text": fact(metrics={"loss": "x"}),
    "metrics too large": fact(metrics={"loss": 10**400}),
    "a time no date has": fact(time=1e300),
    "a time of text": fact(time="now"),
    "a summary of text": fact(summary="x"),
    "seeds that are none": fact(summary={"awake": 3}),
    "shards that are none": fact(summary={"shards": [{"a": 1}]}),
    "a step that is true": fact(step=True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_lie_is_passed_over_and_listed(folder: Path, tmp_path: Path, case: str) -> None:
    CASES[case](folder / LAST)
    begun = time.perf_counter()
    if case != "a tensor of another shape":  # only the run knows which model it has
        with pytest.raises(CheckpointError):
            read(FolderStorage(folder), LAST)
    manager = train(folder, 0)
    assert manager.steps == 1
    assert time.perf_counter() - begun < 5
    manager.close()
    for command in (["list"], ["list", "--json"], ["verify"], ["prune", "--dry-run", "--best", "loss:min"]):
        ran = CliRunner().invoke(app, ["checkpoints", command[0], str(folder), *command[1:]])
        assert ran.exit_code in (0, 1), ran.output
    ran = CliRunner().invoke(app, ["checkpoints", "export", str(folder), str(tmp_path / "model")])
    assert ran.exit_code == 0, ran.output


def test_a_damaged_row_does_not_hide_the_others(folder: Path) -> None:
    fact(time="now")(folder / LAST)
    ran = CliRunner().invoke(app, ["checkpoints", "list", str(folder)])
    assert "step-00000001 " in ran.stdout
    assert f"{LAST}  damaged: {LAST}: the manifest's time is not of its kind" in ran.stdout


def test_a_checkpoint_of_another_run_stays_and_is_told(folder: Path) -> None:
    told: list[str] = []
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    storage = FolderStorage(folder)
    fact(summary={"run": "another"})(folder / LAST)
    manager = CheckpointManager(
        storage, Run(net, optimizer), observe=lambda event: told.append(str(event.data.get("message")))
    )
    manager.restore(read(storage, "step-00000001"))
    manager.save(wait=True)
    manager.close()
    assert storage.names() == ["step-00000001", LAST]
    assert any(f"{LAST} is of a later step and of another run; it was left alone" in line for line in told)


def test_a_state_that_a_part_refuses_is_an_error_of_ours(folder: Path) -> None:
    class Picky:
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            raise KeyError("position")

    net = nn.Linear(3, 2)
    run = Run(net, torch.optim.Adam(net.parameters()), others={"picky": Picky()})
    entry("others", {"dict": {"picky": {"dict": {}}}})(folder / LAST)
    with CheckpointManager(folder, run) as manager, pytest.raises(StateError, match="KeyError: 'position'"):
        manager.resume()


@pytest.mark.parametrize("early", [1.5, "x", [], {}, {"evidence": 3}])
def test_a_recipe_of_another_kind_is_no_state(early: Any) -> None:
    net, batch = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)), torch.randn(64, 3)
    optimizer = torch.optim.Adam(net.parameters())

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    growth = esper.grow(net, optimizer, loss_fn, probe=[batch], steps=50, growth="early")
    state = capture_run(Run(net, optimizer, growth=growth), 0)
    assert state["growth"] is not None
    assert require_state(state, 0, LAST) is state
    lie = {**state, "growth": {**state["growth"], "early": early}}
    with pytest.raises(CheckpointError, match="the state's growth is missing, or not of its kind"):
        require_state(lie, 0, LAST)
    growth.finish()
