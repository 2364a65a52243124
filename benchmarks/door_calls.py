"""Every public door with what fits it, and how a call goes through it with something else instead."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import nn
from typer.testing import CliRunner

import esper
from benchmarks.door_values import BATCH, NESTS, ODD, STEPS, TEXTS, X, loss_fn, settings_like
from esper.cli import app
from esper.saving.save import sums

HOST = """
import torch
from torch import nn
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
BATCH = X, X[:, :3].abs().argmax(1)
def net(hidden=2): return nn.Sequential(nn.Linear(6, hidden), nn.ReLU(), nn.Linear(hidden, 3))
def data(): return {"train": [BATCH] * 2, "probe": [BATCH], "val": [BATCH]}
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1])
def wrong(*given): raise KeyError("mine")
"""
RECIPE: dict[str, Any] = {
    "model": "door_host:net",
    "data": "door_host:data",
    "loss": "cross_entropy",
    "optimizer": {"call": "torch.optim:Adam", "arguments": {"lr": 0.01}},
    "epochs": 1,
    "growth": {"growth": "off"},
}
COMMANDS: dict[str, list[Any]] = {
    "why": ["run", "1"],
    "report": ["run", "--out", "out.html"],
    "checkpoints list": ["."],
    "checkpoints verify": [".", "1"],
    "checkpoints prune": [".", "--keep", "3", "--best", "loss:min"],
    "checkpoints export": [".", "to", "--name", "1"],
    "blueprints list": ["--json"],
    "blueprints show": ["bottleneck", "--hidden", "4"],
    "kernels list": ["--store", "folder"],
    "kernels show": ["abc", "--store", "folder"],
    "kernels verify": ["abc", "--store", "folder"],
    "chaos": ["c.yaml", "--faults", "odd", "--seed", "1", "--epochs", "1", "--list"],
    "bench": ["odd"],
    "train": ["none.yaml", "--run-dir", "trained", "--resume", "auto"],
}


@dataclass
class Case:
    """One call: which door, and what is given in place of what fits."""

    door: str
    changes: dict[str, Any]
    model: nn.Sequential
    optimizer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)


def wrap(case: Case) -> None:
    given = {"model": case.model, "example_inputs": X, **case.changes}
    esper.wrap(given.pop("model"), given.pop("example_inputs"), **given)


def plan(case: Case) -> None:
    given = {"model": case.model, "example_inputs": X, **case.changes}
    str(esper.plan(given.pop("model"), given.pop("example_inputs"), **given))


def summary(case: Case) -> None:
    str(esper.summary(case.changes.get("model", case.model)))


def unwrap(case: Case) -> None:
    esper.unwrap(case.changes.get("model", case.model))


def grow(case: Case) -> None:
    given = {
        "model": case.model,
        "optimizer": case.optimizer,
        "loss_fn": loss_fn,
        "probe": [BATCH],
        "steps": STEPS,
    }
    given |= case.changes
    esper.grow(given.pop("model"), given.pop("optimizer"), given.pop("loss_fn"), **given)


def trainer(case: Case) -> None:
    given = {"model": case.model, "optimizer": case.optimizer, "loss_fn": loss_fn, "probe": [BATCH]}
    given |= {"train": [BATCH], "epochs": 1, **case.changes}
    esper.Trainer(given.pop("model"), given.pop("optimizer"), given.pop("loss_fn"), **given)


def load_config(case: Case) -> None:
    esper.load_config(case.changes["source"])


def config_text(case: Case) -> None:
    Path("settings.yaml").write_text(case.changes["text"], encoding="utf-8", errors="replace")
    esper.load_config("settings.yaml")


def config(case: Case) -> None:
    esper.Config(**case.changes["values"])


def save(case: Case) -> None:
    _GROWN[0].save(case.changes["directory"])


def load_into(case: Case) -> None:
    esper.load_into(case.changes.get("model", case.model), case.changes.get("directory", "saved"))


def load_spoilt(case: Case) -> None:
    """A saved model of which one value of the genome is another, with digests that say it was meant so."""
    files = {path.name: path.read_bytes() for path in Path("saved").iterdir() if path.name != "SHA256SUMS"}
    recipe = json.loads(files["genome.json"])
    replace(recipe, case.changes["where"], case.changes["value"])
    files["genome.json"] = json.dumps(recipe).encode()
    spoilt = Path("spoilt")
    spoilt.mkdir(exist_ok=True)
    files["SHA256SUMS"] = sums({name: sha256(content).hexdigest() for name, content in files.items()})
    for name, content in files.items():
        (spoilt / name).write_bytes(content)
    esper.load_into(case.model, spoilt)


def replace(tree: Any, where: list[int], value: Any) -> None:
    """Put a value at a place in a nest, found by turns."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        if not keys:
            return
        key = keys[where[0] % len(keys)]
        if len(where) == 1 or not isinstance(tree[key], dict | list) or not tree[key]:
            tree[key] = value
            return
        tree, where = tree[key], where[1:]


def events(case: Case) -> str:
    """A run of which one value of one event is another: why, report and totals read it."""
    lines = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    replace(lines, case.changes["where"], case.changes["value"])
    spoilt = Path("spoilt_run")
    spoilt.mkdir(exist_ok=True)
    (spoilt / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command(["why", "spoilt_run"])
    return command(["why", "spoilt_run", "--json"])


def recipe(case: Case) -> str:
    Path("c.yaml").write_text(yaml.safe_dump({**RECIPE, **case.changes["recipe"]}))
    return command(["train", "c.yaml", "--plain", "--run-dir", "trained"])


def cli(case: Case) -> str:
    return command(case.changes["line"])


def command(line: list[str]) -> str:
    """Run a command in this process; what it lets through is raised again, and so is a hostile character."""
    ran = CliRunner().invoke(app, line)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        raise ran.exception
    hostile = {c for c in ran.output if not c.isprintable() and c not in "\n\t"}
    assert not hostile, f"{hostile} reach the terminal"
    return f"exit {ran.exit_code}"


_GROWN: list[Any] = []  # the run of the present folder, for the door of save


def prepare() -> None:
    """Leave in the working folder what the doors read: a run, a saved model, a pipe, a module."""
    Path("door_host.py").write_text(HOST)
    sys.path.append(str(Path.cwd()))
    if not Path("pipe").exists():
        os.mkfifo("pipe")
        Path("folder").mkdir()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    growth = esper.grow(model, optimizer, loss_fn, probe=[BATCH], steps=STEPS, run_dir="run")
    for _ in range(STEPS):
        loss = loss_fn(model, BATCH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        growth.step(BATCH, loss)
    growth.finish()
    growth.save("saved")
    _GROWN[:] = [growth]


def some(
    names: list[str], special: dict[str, SearchStrategy[Any]] | None = None
) -> SearchStrategy[dict[str, Any]]:
    """One or two parameters with odd values, or with those of their own kind."""
    values = special or {}

    def one(name: str) -> SearchStrategy[tuple[str, Any]]:
        return st.tuples(st.just(name), (values[name] | ODD) if name in values else ODD)

    return st.lists(st.sampled_from(names).flatmap(one), min_size=1, max_size=2).map(dict)


def line_of(words: str) -> SearchStrategy[dict[str, Any]]:
    """A command with one of its words replaced by another, or an odd one added."""
    known = [*words.split(), *COMMANDS[words]]
    odd = TEXTS.map(lambda text: text.replace("\0", "")) | st.integers().map(str) | st.just("9" * 5000)
    place = st.integers(len(words.split()), len(known))
    return st.tuples(place, odd).map(lambda one: {"line": [*known[: one[0]], one[1], *known[one[0] + 1 :]]})


SETTINGS = settings_like(esper.Config)
BUDGET = settings_like(esper.Config.model_fields["budget"].annotation)
WORDS = {"config": SETTINGS, "budget": BUDGET, "growth": st.sampled_from(["early", "incubate", "off"])}
WHERE = st.lists(st.integers(0, 30), min_size=1, max_size=8)
WRAP = "model example_inputs sites seeds_per_site blueprints raced deepen".split()
PLAN = "model example_inputs steps sites budget growth config".split()
GROW = (
    "model optimizer loss_fn probe example per_example batch_axis steps schedulers scaler ema sites budget "
    "growth config run_dir seed on_event"
).split()
TRAINER = (
    "model optimizer loss_fn train probe epochs val batch_axis scheduler scheduler_interval metrics sites "
    "growth config run_dir seed on_event checkpoints every keep best"
).split()
KEYS = st.sampled_from(sorted(RECIPE)) | TEXTS
RECIPES = st.dictionaries(KEYS, SETTINGS | NESTS, min_size=1, max_size=2)
JSON = NESTS.map(lambda value: json.loads(json.dumps(value)))
# What runs, what it is given, and how often of a hundred.
DOORS: dict[str, tuple[Callable[[Case], str | None], SearchStrategy[dict[str, Any]], int]] = {
    "wrap": (wrap, some(WRAP), 16),
    "plan": (plan, some(PLAN, WORDS), 14),
    "summary": (summary, some(["model"]), 2),
    "unwrap": (unwrap, some(["model"]), 2),
    "grow": (grow, some(GROW, WORDS), 14),
    "Trainer": (trainer, some(TRAINER, WORDS), 14),
    "load_config": (load_config, st.fixed_dictionaries({"source": SETTINGS | ODD}), 6),
    "load_config of a file": (
        config_text,
        st.fixed_dictionaries({"text": st.text(max_size=200) | SETTINGS.map(lambda s: yaml.safe_dump(s))}),
        6,
    ),
    "Config": (config, st.fixed_dictionaries({"values": SETTINGS}), 6),
    "save": (save, st.fixed_dictionaries({"directory": ODD}), 3),
    "load_into": (load_into, some(["model", "directory"]), 3),
    "load_into of a spoilt folder": (load_spoilt, st.fixed_dictionaries({"where": WHERE, "value": JSON}), 4),
    "why of spoilt events": (events, st.fixed_dictionaries({"where": WHERE, "value": JSON}), 3),
    "esper train": (
        recipe,
        st.fixed_dictionaries({"recipe": RECIPES}),
        2,
    ),
    "esper …": (cli, st.sampled_from(sorted(COMMANDS)).flatmap(line_of), 5),
}
