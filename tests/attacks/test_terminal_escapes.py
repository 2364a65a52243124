"""A14: what files, paths and names hold moves no terminal, whichever command shows it."""

import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import esper
from esper.blueprints import CATALOGUE
from esper.cli import app
from esper.nissa.run.history import fold
from esper.nissa.run.journal import EVENTS_FILE, read_events
from esper.nissa.views.live import LiveView

ESCAPE = "\x1b[31mRED\x1b]0;t\x07\u202e\x9b1m"
HOST = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("a\\x1b[31m", nn.Linear(6, 2))
        self.add_module("b\\x9b\\x07", nn.Linear(2, 3))

    def forward(self, x):
        first, second = self._modules.values()
        return second(torch.tanh(first(x)))


Net.__name__ = "Net\\x1b[31m"


def batches(count, seed):
    x = torch.randn(count, 32, 6, generator=torch.Generator().manual_seed(seed))
    return [(one, one[:, :3].abs().argmax(1)) for one in x]


def data():
    return {"train": batches(20, 0), "val": batches(4, 1), "probe": batches(8, 2)}
"""


def hostile(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c != "\n"}


_spec = importlib.util.spec_from_file_location(
    "nissa_runs", Path(__file__).parents[1] / "nissa" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_runs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_runs)
events, run = _runs.events, _runs.run


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Run a command in this process; return all it wrote, in which nothing may be hostile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: object) -> str:
        ran = CliRunner().invoke(app, [*map(str, arguments)])
        assert ran.exception is None or isinstance(ran.exception, SystemExit), ran.exception
        assert hostile(ran.output) == set(), ran.output
        return ran.output

    yield run
    sys.modules.pop("hostile_host", None)


@pytest.fixture
def hostile_run(run: Path) -> Path:
    """A run in whose events every word but their names holds escapes."""

    def spoilt(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            return {name: spoilt(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [spoilt(item, key) for item in value]
        is_word = isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity")
        return value + ESCAPE if is_word and key not in ("kind", "action", "target") else value

    path = run / EVENTS_FILE
    lines = [spoilt(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize("more", [(), (1,), ("--json",)])
def test_why_shows_events_as_they_are_written(says, hostile_run: Path, more: tuple) -> None:
    told = says("why", hostile_run, *more)
    assert "1b[31mRED" in told
    assert "do not fit" not in told


def test_the_report_s_totals(says, hostile_run: Path) -> None:
    says("report", hostile_run)
    says("report", hostile_run, "--json")


@pytest.mark.parametrize("plain", [True, False])
def test_the_view_of_a_run(hostile_run: Path, plain: bool) -> None:
    console = Console(record=True, width=300, file=io.StringIO())
    with LiveView(console, plain=plain) as view:
        for event in read_events(hostile_run):
            view(event)
    if not plain:
        console.print(view._screen())
    told = console.export_text()
    assert r"\x1b[31mRED" in told
    assert hostile(told) == set()

    assert fold(read_events(hostile_run)).totals == view.history.totals


def test_names_of_modules_while_they_train_and_afterwards(says, tmp_path: Path) -> None:
    (tmp_path / "hostile_host.py").write_text(HOST)
    recipe = {
        "model": "hostile_host:Net",
        "data": "hostile_host:data",
        "loss": "cross_entropy",
        "optimizer": {"call": "torch.optim:Adam", "arguments": {"lr": 0.01}},
        "metrics": {f"acc{ESCAPE}": "accuracy"},
        "epochs": 4,
        "run_dir": f"run{ESCAPE}".replace("/", ""),
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(recipe))
    assert r"Net\x1b[31m" in says("train", "c.yaml", "--plain")
    assert "u001b[31m" in says("train", "c.yaml", "--plain", "--json", "--run-dir", "other")
    says("why", "other")


@pytest.mark.parametrize(
    "line",
    [
        ("why", ESCAPE),
        ("train", ESCAPE),
        ("train", "c.yaml", "--resume", ESCAPE),
        ("train", f"--{ESCAPE}"),
        (ESCAPE,),
        (f"--{ESCAPE}",),
        ("checkpoints", ESCAPE),
        ("kernels", "show", ESCAPE),
        ("kernels", "list", "--store", ESCAPE),
        ("blueprints", "show", ESCAPE),
        ("blueprints", "show", f"{ESCAPE}.json"),
        ("bench", ESCAPE),
        ("chaos", "c.yaml", "--faults", ESCAPE),
        ("checkpoints", "list", ESCAPE),
        ("checkpoints", "prune", ".", "--best", ESCAPE),
        ("report", ESCAPE),
    ],
)
def test_what_was_typed(says, line: tuple[str, ...]) -> None:
    assert "[31mRED" in says(*line)


def test_the_words_of_a_blueprint(says, tmp_path: Path) -> None:
    graph = json.loads(CATALOGUE.get("bottleneck").to_json())
    graph |= {"summary": f"sum{ESCAPE}", "source": f"src{ESCAPE}"}
    (tmp_path / "mine.json").write_text(json.dumps(graph))
    told = says("blueprints", "show", "mine.json")
    assert told.count(r"\x1b[31mRED") == 2
    says("blueprints", "show", "mine.json", "--json")


def test_plan_and_summary_print_names_as_they_are_written() -> None:
    net = nn.Sequential()
    net.add_module(f"a{ESCAPE.replace('.', '')}", nn.Linear(6, 2))
    net.add_module("act", nn.ReLU())
    net.add_module("[bold]b[/]", nn.Linear(2, 3))
    x = torch.randn(4, 6)
    for made in (esper.plan(net, x), esper.summary(esper.wrap(net, x))):
        assert r"a\x1b[31mRED" in str(made)
        assert "[bold]b[/]" in str(made)
        assert hostile(str(made)) == set()
