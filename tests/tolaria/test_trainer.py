"""The Trainer is the loop a user would write: held against one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from typer.testing import CliRunner

import esper
from esper.checkpoint import storage_at
from esper.checkpoint.format.reader import read
from esper.cli.application import app
from esper.contracts import Event
from esper.errors import ConfigError, FinishedError, StateError
from esper.tolaria.trainer import Trainer

EPOCHS = 8


def two_moons(examples: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(examples) * math.pi
    label = torch.randint(2, (examples,))
    side = 1.0 - 2.0 * label
    x = torch.stack([side * angle.cos() + label, side * angle.sin() + 0.5 * label], 1)
    return x + 0.1 * torch.randn(examples, 2), label


class Data:
    """Three parts of one problem; the same seed gives the same batches in the same order."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.train = DataLoader(
            TensorDataset(*two_moons(320)),
            batch_size=32,
            shuffle=True,
            generator=torch.Generator().manual_seed(2),
        )
        self.val = DataLoader(TensorDataset(*two_moons(70)), batch_size=32)  # the last batch is smaller
        self.probe = DataLoader(TensorDataset(*two_moons(128)), batch_size=128)


def make_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 1), nn.Tanh(), nn.Dropout(0.1), nn.Linear(1, 2))


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float().mean()


def trainer_of(model: nn.Module, data: Data, **options: Any) -> Trainer:
    optimizer = options.pop("optimizer", None) or Adam(model.parameters(), lr=0.02)
    defaults = {
        "train": data.train,
        "val": data.val,
        "probe": data.probe,
        "epochs": EPOCHS,
        "metrics": {"accuracy": accuracy},
    }
    return Trainer(model, optimizer, loss_fn, **{**defaults, **options})


def test_it_equals_the_loop_a_user_would_write(tmp_path: Path) -> None:
    data, model = Data(), make_model()
    torch.manual_seed(4)
    trainer = trainer_of(model, data, run_dir=tmp_path / "run", seed=5)
    assert trainer.fit() is model

    data, twin = Data(), make_model()
    torch.manual_seed(4)
    optimizer = Adam(twin.parameters(), lr=0.02)
    growth = esper.grow(twin, optimizer, loss_fn, probe=data.probe, steps=EPOCHS * len(data.train), seed=5)
    history = []
    for _ in range(EPOCHS):
        twin.train()
        for batch in data.train:
            loss = loss_fn(twin, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            growth.step(batch, loss)
        twin.eval()
        x, y = data.val.dataset.tensors
        list(data.val)  # drawing from a DataLoader moves the random stream
        with torch.no_grad():
            history.append((float(loss_fn(twin, (x, y))), float(accuracy(twin, (x, y)))))
    growth.finish()

    assert growth.plans, "nothing grew, so this test shows nothing"
    assert trainer.growth.plans == growth.plans
    assert all(torch.equal(t, twin.state_dict()[n]) for n, t in model.state_dict().items())
    assert [row["epoch"] for row in trainer.history] == list(range(1, EPOCHS + 1))
    for row, (loss_value, share) in zip(trainer.history, history, strict=True):
        assert row["loss"] == pytest.approx(loss_value, rel=1e-5)
        assert row["accuracy"] == pytest.approx(share, abs=1e-6)  # weighted by examples, not by batches
    assert trainer.history[-1]["train_loss"] < trainer.history[0]["train_loss"]
    assert (tmp_path / "run" / "events.jsonl").exists()


def test_metrics_reach_the_run_and_modes_are_right() -> None:
    data, model, seen, modes = Data(), make_model(), [], set()

    def watched(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            modes.add(model.training)
        return loss_fn(model, batch)

    def mode(model: nn.Module, batch: Any) -> float:
        return float(model.training or torch.is_grad_enabled())

    trainer = Trainer(
        model,
        SGD(model.parameters(), lr=0.1),
        watched,
        train=data.train,
        val=data.val,
        probe=data.probe,
        epochs=2,
        metrics={"training mode": mode},
        growth="off",  # growth asks held-out examples for gradients, without dropout
        on_event=seen.append,
    )
    trainer.fit()
    assert modes == {True}
    epochs = [event for event in seen if isinstance(event, Event) and event.kind == "epoch"]
    assert [event.data["epoch"] for event in epochs] == [1, 2]
    assert epochs[0].data["metrics"].keys() == {"train_loss", "loss", "training mode"}
    assert epochs[0].data["metrics"]["training mode"] == 0.0


SCHEDULES: dict[str, tuple[Callable[[Optimizer], LRScheduler], str, int]] = {
    "StepLR": (lambda o: StepLR(o, step_size=1, gamma=0.5), "epoch", 3),
    "OneCycleLR": (lambda o: OneCycleLR(o, max_lr=0.02, total_steps=40), "step", 30),
    "ReduceLROnPlateau": (lambda o: ReduceLROnPlateau(o, threshold=10.0, patience=0), "epoch", 3),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_move_when_they_should(name: str) -> None:
    make, interval, moves = SCHEDULES[name]
    data, model = Data(), make_model()
    optimizer = Adam(model.parameters(), lr=0.02)
    scheduler = make(optimizer)
    trainer_of(
        model, data, optimizer=optimizer, epochs=3, scheduler=scheduler, scheduler_interval=interval
    ).fit()

    idle = Adam([nn.Parameter(torch.zeros(1))], lr=0.02)
    expected = make(idle)
    idle.step()
    for _ in range(moves):
        expected.step(*[1.0] if isinstance(expected, ReduceLROnPlateau) else [])
    assert optimizer.param_groups[0]["lr"] == idle.param_groups[0]["lr"] != 0.02


def test_several_optimizers_and_no_validation() -> None:
    data, model = Data(), make_model()
    optimizers = {"first": SGD(model[0].parameters(), lr=0.1), "second": Adam(model[3].parameters(), lr=0.02)}
    before = [p.clone() for p in model.parameters()]
    trainer = trainer_of(model, data, optimizer=optimizers, val=None, epochs=1)
    trainer.fit()
    assert trainer.history[0].keys() == {"epoch", "train_loss"}
    for p, old in zip(model.parameters(), before, strict=True):
        assert not torch.equal(p[tuple(slice(size) for size in old.shape)], old)


class Stream(IterableDataset):
    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts)


def test_training_data_without_a_length_leaves_the_number_of_steps_open() -> None:
    data, model, seen = Data(), make_model(), []
    stream = DataLoader(Stream(list(data.train.dataset)), batch_size=32)
    trainer_of(model, data, train=stream, epochs=1, on_event=seen.append).fit()
    started = next(event for event in seen if event.kind == "run_started")
    assert started.data["steps"] is None


def test_what_cannot_go_on_says_so() -> None:
    data, model = Data(), make_model()
    one_shot = trainer_of(model, data, train=iter(list(data.train)), epochs=2)
    with pytest.raises(ConfigError, match=r"train gave no batch; .* like a DataLoader"):
        one_shot.fit()
    done = trainer_of(make_model(), data, epochs=1)
    done.fit()
    with pytest.raises(FinishedError, match="make a new one"):
        done.fit()
    with pytest.raises(ConfigError, match="the batches to evaluate are empty"):
        done.evaluate([])


def test_metrics_over_batches_of_any_kind_are_weighted_by_examples() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    def square(model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"]
        return model(x).square().mean()

    model, batches = Mean(), [{"x": torch.randn(5, 2)}, {"x": torch.randn(3, 2)}]
    trainer = Trainer(model, Adam(model.parameters()), square, train=batches, probe=batches, epochs=1)
    values = trainer.evaluate(batches)
    expected = square(model, {"x": torch.cat([b["x"] for b in batches])}).detach()
    assert values == {"loss": pytest.approx(float(expected))}


@pytest.mark.parametrize("stop", [7, 16, 41])
def test_a_stopped_training_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def begun(folder: Path, last: int | None = None) -> Trainer:
        seen = 0

        def stopping(*given: Any) -> None:
            nonlocal seen
            seen += 1
            if last is not None and seen > last:
                raise Stopped

        data, model = Data(), make_model()
        optimizer = Adam(model.parameters(), lr=0.02)
        given = {"train": data.train, "val": data.val, "probe": data.probe, "epochs": 6}
        optimizer.register_step_pre_hook(stopping)
        torch.manual_seed(4)
        return Trainer(model, optimizer, loss_fn, **given, checkpoints=folder, every=1, keep=2)

    whole = begun(tmp_path / "whole")
    whole.fit()
    cut = begun(tmp_path / "cut", last=stop)
    with pytest.raises(Stopped):
        cut.fit()
    assert cut.manager is not None
    cut.manager.close()
    again = begun(tmp_path / "cut")
    assert again.resume() is not None
    again.fit()
    assert again.history == whole.history
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("every", [1, None])
def test_the_best_epoch_on_val_can_be_had_again(every: int | None, tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    def remembered(model: nn.Module, batch: Any) -> float:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return 0.0

    data, model = Data(), make_model()
    given = {"train": data.train, "val": [next(iter(data.val))], "probe": data.probe, "epochs": 12}
    keeping = {"checkpoints": tmp_path / "run", "every": every, "keep": 1, "best": ("loss", "min")}
    metrics = {"remembered": remembered}
    optimizer = Adam(model.parameters(), lr=0.5)  # it overshoots: the last epoch is not the best
    trainer = Trainer(model, optimizer, loss_fn, metrics=metrics, **given, **keeping)
    trainer.fit()
    losses = [row["loss"] for row in trainer.history]
    best = losses.index(min(losses))
    assert best < len(losses) - 1
    export = ["checkpoints", "export", str(tmp_path / "run"), str(tmp_path / "best"), "--best", "loss:min"]
    assert CliRunner().invoke(app, export).exit_code == 0
    restored = esper.load_into(make_model(), tmp_path / "best").state_dict()
    assert restored.keys() == seen[best].keys()
    assert all(torch.equal(restored[name], value) for name, value in seen[best].items())


def test_going_on_from_the_best_epoch_gives_the_same_bits(tmp_path: Path) -> None:
    def begun(folder: Path) -> Trainer:
        data, model = Data(), make_model()
        given = {"train": data.train, "val": data.val, "probe": data.probe, "epochs": 6}
        keeping = {"checkpoints": folder, "every": 10**6, "milestones": False, "keep": None}
        torch.manual_seed(4)
        optimizer = Adam(model.parameters(), lr=0.02)
        return Trainer(model, optimizer, loss_fn, **given, **keeping, best=("loss", "min"))

    whole = begun(tmp_path)
    whole.fit()
    storage = storage_at(tmp_path)
    early = [name for name in storage.names() if name != "step-00000060"]
    assert early
    again = begun(tmp_path)
    assert again.manager is not None
    again.manager.restore(read(storage, early[0]))
    again.fit()
    assert again.history == whole.history
    assert all(map(torch.equal, again.model.state_dict().values(), whole.model.state_dict().values()))


def test_the_best_of_what_is_not_measured_is_refused(tmp_path: Path) -> None:
    model, data = make_model(), Data()
    given = {"train": data.train, "probe": data.probe, "epochs": 1, "checkpoints": tmp_path}
    optimizer = Adam(model.parameters())
    with pytest.raises(ConfigError, match="measured on val=, and there is none"):
        Trainer(model, optimizer, loss_fn, **given, best=("loss", "min"))
    with pytest.raises(ConfigError, match="known: loss, train_loss"):
        Trainer(model, optimizer, loss_fn, **given, val=data.val, best=("accuracy", "max"))


def test_resuming_without_checkpoints_says_what_to_give() -> None:
    with pytest.raises(StateError, match="give it checkpoints="):
        trainer_of(make_model(), Data()).resume()
