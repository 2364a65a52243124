"""Every public argument of wrong kind or range is refused in Esper's words, and nothing is touched."""

import copy
import inspect
import math
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper.errors import EsperError

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
BATCH = (X, X[:, :3].abs().argmax(1))


class Unreadable(list[object]):
    """A collection that breaks when it is read."""

    def __iter__(self) -> Any:
        raise RuntimeError("of the user's own")


ODD: list[Any] = [
    Unreadable([1]),
    True,
    -1,
    2.5,
    math.nan,
    math.inf,
    10**30,
    "",
    "\0",
    "x" * 5000,
    b"x",
    [1],
    [None],
    {"a": 1},
    {1: 2},
    {1, 2},
    object(),
    object,
    ...,
    torch.zeros(3),
]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 3))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Any) -> float:
    return float((model(batch[0]).argmax(1) == batch[1]).float().mean())


def train(model: Any, **changes: Any) -> esper.Trainer:
    given = {"train": [BATCH], "probe": [BATCH], "epochs": 1, "config": {"growth": "off"}, **changes}
    return esper.Trainer(model, torch.optim.Adam(model.parameters()), loss_fn, **given)


def kept(model: Any, **changes: Any) -> esper.Trainer:
    return train(model, **{"checkpoints": "kept", **changes})


Door = Callable[..., Any]
WRAP: Door = lambda model, **changes: esper.wrap(model, **{"example_inputs": X, **changes})  # noqa: E731
PLAN: Door = lambda model, **changes: esper.plan(model, **{"example_inputs": X, **changes})  # noqa: E731
# Every parameter with what else it takes no.
DOORS: dict[str, tuple[Door, dict[str, list[Any]]]] = {
    "wrap": (
        WRAP,
        {
            "example_inputs": [
                None,
                0,
                [],
                {},
                (),
                torch.tensor(1.0),
                torch.zeros(8, 5),
                "x",
                [X, X],
                {"y": X},
            ],
            "sites": [
                None,
                0,
                {},
                [],
                (),
                "",
                {"a": 1},
                {"include": 1},
                [1],
                "nowhere",
                int,
                {"include": []},
            ],
            "seeds_per_site": [None, 0, "4", 1025, []],
            "blueprints": [None, 0, [], "auto", ["nothing"], [""], ["/etc/passwd"], ["none.json"], {}],
            "raced": [None, 0, 1, "yes", []],
            "deepen": [None, 0, 1, "yes", []],
        },
    ),
    "plan": (
        PLAN,
        {
            "example_inputs": [None, 0, [], {}, torch.tensor(1.0), "x"],
            "steps": [0, "10", 10**9, 1.0, []],
            "sites": [None, {}, {"a": 1}, [], "nowhere"],
            "budget": [0, "8", [], {"growth_factor": None}, {"parameters": -1}, {"growth_factor": math.inf}],
            "growth": [0, "never", [], {}],
            "config": [0, [], (), "none.yaml", {"race": 3}, {1: 2}],
        },
    ),
    "Trainer": (
        train,
        {
            "train": [None, 0, "x"],
            "epochs": [None, 0, "1", 1.0],
            "val": [0, "x"],
            "batch_axis": [-1, 99, "0", 1.0, [], {}, [0, [0, "x"]], {0: 1}, {"z": 1}, (0, 0, 0)],
            "scheduler": [0, "x", []],
            "scheduler_interval": [None, 0, "epochs", "Step", []],
            "metrics": [0, "x", [accuracy], {"a": "x"}, {"epoch": accuracy}, {"train_loss": accuracy}],
            "checkpoints": [0, "", [], "nobody://x"],
            "every": [0, 1, "1", timedelta(hours=1)],
            "keep": [0, 1, None, "3"],
            "best": [0, "x", ("train_loss", "min")],
        },
    ),
    "Trainer with checkpoints": (
        kept,
        {
            "every": [0, "1", 1.0, timedelta(), timedelta(-1)],
            "keep": [0, "3", 1.0],
            "best": [0, "x", "train_loss", ("loss",), ("train_loss", "least"), ("loss", "min"), (1, "min")],
        },
    ),
}
FITS: dict[str, list[Any]] = {"checkpoints": ["x" * 5000], "train": [], "val": []}
CASES = [
    pytest.param(door, name, value, id=f"{label}-{name}-{number}")
    for label, (door, parameters) in DOORS.items()
    for name, others in parameters.items()
    for number, value in enumerate([*others, *ODD])
]


def state(model: nn.Module) -> tuple[Any, ...]:
    tensors = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    hooks = [(type(one), len(one._forward_hooks) + len(one._forward_pre_hooks)) for one in model.modules()]
    streams = random.getstate(), repr(np.random.get_state()), torch.get_rng_state().numpy().tobytes()
    return tensors, hooks, [one.training for one in model.modules()], streams


def fits(name: str, value: Any) -> bool:
    """Tell what of the odd values is none for this parameter."""
    if name in ("train", "val"):  # whatever can be iterated; what it gives is seen when it trains
        return isinstance(value, list | dict | set | Tensor)
    return (name == "checkpoints" and value == "x" * 5000) or (name in ("raced", "deepen") and value is True)


@pytest.mark.parametrize(("door", "name", "value"), CASES)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: Door, name: str, value: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if fits(name, value):
        pytest.skip("this one fits")
    model = net()
    before = copy.deepcopy(state(model))
    with pytest.raises(EsperError) as raised:
        door(model, **{name: value})
    assert state(model) == before
    assert len(str(raised.value)) < 3000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", [None, 3, "x", object(), nn.Linear, torch.zeros(3), [], lambda x: x])
@pytest.mark.parametrize(
    "door", [WRAP, PLAN, esper.summary, esper.unwrap], ids=["wrap", "plan", "summary", "unwrap"]
)
def test_a_model_is_a_module(door: Door, model: Any) -> None:
    with pytest.raises(EsperError):
        door(model)


def test_a_plain_module_has_no_summary_and_the_message_names_plan() -> None:
    with pytest.raises(esper.SiteError, match=r"a Sequential is not wrapped; .* esper\.plan any model"):
        esper.summary(net())  # pyrefly: ignore - on purpose


def test_every_parameter_of_the_doors_is_in_the_tables() -> None:
    elsewhere = {
        "model",
        "optimizer",
        "loss_fn",
        "probe",
        "sites",
        "growth",
        "config",
        "run_dir",
        "seed",
        "on_event",
        "milestones",
        "settings",
    }
    for label, call in {"wrap": esper.wrap, "plan": esper.plan, "Trainer": esper.Trainer}.items():
        names = set(inspect.signature(call).parameters)
        assert names - elsewhere <= set(DOORS[label][1]), label


def test_what_fits_is_taken(tmp_path: Path) -> None:
    trainer = train(
        net(),
        checkpoints=tmp_path / "kept",
        every=1,
        keep=None,
        best=("train_loss", "min"),
        metrics={"accuracy": accuracy},
        val=[BATCH],
    )
    trainer.fit()
    assert trainer.history[0]["accuracy"] >= 0
    assert esper.wrap(net(), X, sites={"exclude": []}, seeds_per_site=1, blueprints=["widen"], raced=True)
