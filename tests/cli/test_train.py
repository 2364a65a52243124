"""Recipes as files, in a folder with the modules they name, run by the real command."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import esper as library
from esper.cli import app
from esper.cli.run.recipe import read_recipe
from esper.cli.run.resolve import batches_of, bound, loss_of, metric_of, resolve
from esper.errors import ConfigError, EsperError
from esper.nissa.run.history import fold
from esper.nissa.run.journal import read_events

HOST = """
import torch
from torch import nn


def build(hidden=2):
    return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def batches(count, seed):
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        x = torch.randn(32, 6, generator=draw)
        made.append((x, x[:, :3].abs().argmax(1)))
    return made


def data(count=20):
    return {"train": batches(count, 0), "val": batches(4, 1), "probe": batches(8, 2)}


class Parts:
    train = batches(4, 0)
    probe = batches(8, 2)


def no_probe():
    return {"train": batches(2, 0)}


def own_loss(model, batch, scale):
    return scale * nn.functional.cross_entropy(model(batch[0]), batch[1])
"""
RECIPE: dict[str, Any] = {
    "model": {"call": "host:build", "arguments": {"hidden": 2}},
    "data": "host:data",
    "loss": "cross_entropy",
    "optimizer": {"call": "torch.optim:Adam", "arguments": {"lr": 0.01}},
    "metrics": {"accuracy": "accuracy"},
    "epochs": 10,
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    (tmp_path / "host.py").write_text(HOST)

    def write(**changes: Any) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, **changes}))
        return path

    return write


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Run the command in this process, which has torch loaded already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield lambda *arguments: CliRunner().invoke(app, [*map(str, arguments)])
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) in {str(path) for path in tmp_path.glob("*.py")}:
            del sys.modules[name]


def test_a_recipe_is_trained_and_grown_into_a_run_folder(esper, recipe, tmp_path: Path) -> None:
    ran = esper("train", recipe())
    assert ran.returncode == 0, ran.stderr
    folder = tmp_path / "runs" / "recipe"
    history = fold(read_events(folder))
    assert history.totals["steps"] == 200
    assert history.totals["finished"]
    assert len(history.epochs) == 10
    assert 0 <= history.epochs[-1].metrics["accuracy"] <= 1
    assert f"run folder: {folder.relative_to(tmp_path)}" in ran.stdout
    assert "[     0] Sequential: 23 parameters" in ran.stderr  # progress is not part of the result
    assert esper("report", folder).returncode == 0
    assert esper("why", folder).returncode == 0


def test_the_result_as_json_and_the_saved_model(inside, recipe, tmp_path: Path) -> None:
    path = recipe(
        scheduler={"call": "torch.optim.lr_scheduler:StepLR", "arguments": {"step_size": 5}}, seed=3
    )
    ran = inside("train", path, "--run-dir", tmp_path / "here", "--json", "--plain")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert told["run"] == str(tmp_path / "here")
    net = library.load_into(resolve("host:build")(), tmp_path / "here" / "model")
    assert sum(parameter.numel() for parameter in net.parameters()) == told["parameters_after"]


def test_a_killed_training_goes_on_by_the_same_command(esper, recipe, tmp_path: Path) -> None:
    path, whole, cut = recipe(), tmp_path / "whole", tmp_path / "cut"
    command = [sys.executable, "-m", "esper", "train", str(path), "--resume", "auto", "--run-dir"]
    assert (
        subprocess.run([*command, str(whole)], cwd=tmp_path, capture_output=True, check=False).returncode == 0
    )
    process = subprocess.Popen(
        [*command, str(cut)], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list((cut / "checkpoints").glob("step-*")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert (
        subprocess.run([*command, str(cut)], cwd=tmp_path, capture_output=True, check=False).returncode == 0
    )
    mine, theirs = ((folder / "model" / "model.safetensors").read_bytes() for folder in (cut, whole))
    assert mine == theirs


def test_settings_of_growth_are_read(inside, recipe) -> None:
    path = recipe(growth={"budget": {"growth_events": 0}}, epochs=2)
    told = json.loads(inside("train", path, "--json").stdout)
    assert (told["kept"], told["parameters_after"]) == (0, 23)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"epocs": 3}, "unknown key 'epocs'; did you mean 'epochs'?"),
        ({"epochs": 0}, "epochs: Input should be greater than or equal to 1 (got 0)"),
        ({"model": {"cal": "host:build"}}, "unknown key 'cal'; did you mean 'call'?"),
        (
            {"scheduler": {"call": "a:b", "argument": {}}},
            "unknown key 'argument'; did you mean 'arguments'?",
        ),
        ({"model": "host"}, "'host' is not a module:callable"),
        ({"model": "hots:build"}, "no module 'hots', neither beside the config nor installed"),
        ({"model": "host:builds"}, "host has no callable 'builds'; did you mean 'build'?"),
        (
            {"model": {"call": "host:build", "arguments": {"width": 3}}},
            "host:build: got an unexpected keyword argument 'width'; it takes (hidden=2)",
        ),
        ({"data": "host:no_probe"}, "host:no_probe returned a dict without 'probe'"),
        ({"loss": "crossentropy"}, "no loss 'crossentropy'; did you mean 'cross_entropy'?"),
        ({"metrics": {"top": "accurate"}}, "no metric 'accurate'; did you mean 'accuracy'?"),
        (
            {"growth": {"race": {"candidate": 4}}},
            "growth: unknown key 'race.candidate'; did you mean 'candidates'?",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_the_cure(
    inside, recipe, tmp_path: Path, changes: dict, complaint: str
) -> None:
    ran = inside("train", recipe(**changes))
    assert ran.exit_code == 2, ran.output
    assert complaint in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_missing_recipe_is_said(esper) -> None:
    ran = esper("train", "gone.yaml")
    assert ran.returncode == 2
    assert "cannot read the config gone.yaml" in ran.stderr


def test_a_missing_key_is_said(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("epochs: 3\n")
    with pytest.raises(ConfigError, match="model: Field required"):
        read_recipe(tmp_path / "recipe.yaml")


BROKEN = """
import torch

def data():
    return 1 / 0

def leave():
    raise SystemExit("done")

def one(batch):
    return 1.0

def text(model, batch):
    return "high"
"""


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"data": "broken:data"}, "data: broken:data raised ZeroDivisionError: division by zero ("),
        ({"data": "broken:leave"}, "data: broken:leave raised SystemExit: done ("),
        ({"model": "builtins:dict"}, "model: builtins:dict gave a dict; an nn.Module is needed"),
        ({"model": ".host:build"}, "model: '.host:build' is not a module:callable"),
        ({"optimizer": "broken:one"}, "optimizer: broken:one gave a float; a torch.optim.Optimizer is"),
        ({"scheduler": "builtins:list"}, "scheduler: builtins:list raised TypeError"),
        (
            {"scheduler": {"call": "torch.optim.lr_scheduler:StepLR", "arguments": {"step_size": 0}}},
            "scheduler: torch.optim.lr_scheduler:StepLR raised ZeroDivisionError",
        ),
        ({"scheduler": "broken:one"}, "scheduler: broken:one gave a float; a torch.optim.lr_scheduler."),
        ({"metrics": {"a": "broken:one"}}, "metrics.a: broken:one: too many positional arguments; it takes"),
        ({"metrics": {"a": "broken:text"}, "epochs": 1}, "metrics.a: broken:text raised ValueError"),
        ({"loss": "broken:one"}, "loss: broken:one: too many positional arguments; it takes"),
        ({"model": "wrong:build"}, "model: 'wrong' cannot be imported: SyntaxError"),
    ],
)
def test_what_a_config_calls_may_raise_and_the_key_is_named(
    inside, recipe, tmp_path: Path, changes: dict, complaint: str
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    (tmp_path / "wrong.py").write_text("def build(:\n")
    ran = inside("train", recipe(**changes))
    assert ran.exit_code == 2, ran.output
    assert complaint in ran.stderr


RATES = {"1e-2": None, "-1": "ValueError", ".nan": "ValueError", "fast": "TypeError", "null": "", "[1]": ""}


@pytest.mark.parametrize("rate", RATES)
def test_a_learning_rate_is_a_number_or_the_optimizer_key_is_named(
    inside, recipe, tmp_path: Path, rate: str
) -> None:
    path = recipe(epochs=1)
    path.write_text(path.read_text().replace("lr: 0.01", f"lr: {rate}"))
    ran = inside("train", path, "--plain")
    if RATES[rate] is None:
        assert ran.exit_code == 0, ran.output
    else:
        assert ran.exit_code == 2, ran.output
        assert f"optimizer: torch.optim:Adam raised {RATES[rate]}" in ran.stderr


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("epochs: true", "epochs: Input should be a valid integer (got True)"),
        ("epochs: 1:30", "epochs: Input should be a valid integer (got '1:30')"),
        ("epochs: 010", "epochs: Input should be a valid integer (got '010')"),
        ("epochs: 2.0", "epochs: Input should be a valid integer (got 2.0)"),
        ("seed: yes", "seed: Input should be a valid integer (got 'yes')"),
        ("seed: -3", "seed: Input should be greater than or equal to 0"),
        ("seed: 18446744073709551616", "seed: Input should be less than or equal to"),
        ("run_dir: ''", "run_dir: String should match pattern"),
        ("run_dir: 3", "run_dir: Input should be a valid string (got 3)"),
        ("model: {call: 'host:build', arguments: {hidden: no}}", "arguments.'hidden': 'no' is text in one"),
        ("model: {call: 'host:build', arguments: {hidden: 2, hidden: 3}}", "the key 'hidden' stands twice"),
        ("model: {call: 'host:build', arguments: {1: 2}}", "the key '1' is no text"),
    ],
)
def test_a_value_is_of_its_kind(inside, recipe, line: str, complaint: str) -> None:
    path = recipe()
    key = line.partition(":")[0]
    kept = {name: value for name, value in yaml.safe_load(path.read_text()).items() if name != key}
    path.write_text(yaml.safe_dump(kept) + line + "\n")
    ran = inside("train", path)
    assert ran.exit_code == 2, ran.output
    assert complaint in ran.stderr


def test_modules_beside_a_config_never_shadow_what_is_installed(esper, recipe, tmp_path: Path) -> None:
    path = recipe(epochs=1)
    for name in ("numpy", "rich"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    away = tmp_path / "away"
    away.mkdir()
    assert esper("train", path, "--plain", cwd=away).returncode == 0
    ran = esper("train", recipe(model="numpy:build"), cwd=away)
    assert ran.returncode == 2
    assert f"model: there are two modules 'numpy': {tmp_path}/numpy.py, beside the config, and " in ran.stderr


def test_a_module_that_lacks_another_names_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="needy needs not_there_at_all, which is not installed"):
        resolve("needy:thing")


def test_own_losses_and_metrics_get_their_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_host.py").write_text(HOST)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({**RECIPE, "loss": {"call": "own_host:own_loss", "arguments": {"scale": 2.0}}})
    )
    spec = read_recipe(tmp_path / "recipe.yaml").loss
    model, batch = resolve("own_host:build")(), resolve("own_host:data")()["val"][0]
    plain = loss_of(read_recipe_loss("cross_entropy", tmp_path))
    squared = metric_of(read_recipe_loss("mse", tmp_path))
    x, _ = batch
    with torch.no_grad():
        assert float(loss_of(spec)(model, batch)) == pytest.approx(2 * float(plain(model, batch)))
        assert metric_of(spec)(model, batch) == pytest.approx(2 * float(plain(model, batch)))
        assert squared(model, (x, model(x))) == 0.0


def read_recipe_loss(name: str, folder: Path) -> Any:
    path = folder / "named.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "loss": name}))
    return read_recipe(path).loss


def test_data_may_be_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "object_host.py").write_text(HOST)
    monkeypatch.syspath_prepend(tmp_path)
    parts = resolve("object_host:Parts")()
    found = batches_of(parts, read_recipe_loss("object_host:Parts", tmp_path))
    assert found["train"] is parts.train
    assert found["val"] is None


def test_a_callable_built_in_c_is_checked_when_it_is_called(tmp_path: Path) -> None:
    spec = read_recipe_loss("builtins:dict", tmp_path)
    assert bound(dict, spec, ())() == {}


def test_every_mistake_is_of_esper_s_tree() -> None:
    assert issubclass(ConfigError, EsperError)
