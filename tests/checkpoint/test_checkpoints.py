"""A run goes on bit for bit, saving is out of training's way, and trouble never ends training."""

from __future__ import annotations

import random
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esper.checkpoint import CheckpointManager, FolderStorage, MemoryStorage, Run
from esper.checkpoint.format.reader import sound
from esper.contracts import Event
from esper.errors import ConfigError, FinishedError, StateError, StoreError
from esper.storage.protocol import Chunks
from tests.checkpoint.killable import STEPS, Training


class Plain:
    """A run without growth: dropout, a scheduler, several optimizers, an object of the user's."""

    def __init__(self, storage: Any, turned: bool = False, **options: Any) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))
        self.net[0].bias.requires_grad_(False)
        self.net.register_buffer("seen", torch.zeros(()), persistent=False)
        self.head = nn.Linear(2, 1)
        own = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizers = {
            "net": torch.optim.Adam([{"params": own[:1], "lr": 0.1}, {"params": own[1:]}], lr=0.01),
            "head": torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9),
        }
        if turned:  # other rates, and the parameters in another order
            turned_groups = [{"params": own[:1], "lr": 0.7}, {"params": own[:0:-1]}]
            self.optimizers["net"] = torch.optim.Adam(turned_groups, lr=0.5)
        self.scheduler = torch.optim.lr_scheduler.MultiStepLR(self.optimizers["net"], [3, 5])
        self.rng = np.random.default_rng(5)
        self.told: list[str] = []
        run = Run(
            self.net,
            self.optimizers,
            modules={"head": self.head},
            others={"scheduler": self.scheduler},
            generators={"noise": self.rng},
        )
        self.manager = CheckpointManager(storage, run, observe=self.hear, **{"every": 10**9, **options})

    def hear(self, event: Event) -> None:
        assert threading.current_thread() is threading.main_thread()
        if event.kind == "warning":
            self.told.append(event.data["message"])

    def train(self, steps: int) -> None:
        for _ in range(steps):
            x = torch.randn(8, 4) + random.random() + float(np.random.rand()) + float(self.rng.random())
            loss = self.head(self.net(x)).square().mean()
            for optimizer in self.optimizers.values():
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.net.seen += 1
            self.scheduler.step()
            self.manager.step({"loss": loss})

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            **dict(self.net.named_parameters()),
            **{f"h.{k}": v for k, v in self.head.state_dict().items()},
        }


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_plain_run_goes_on_bit_for_bit(at: int, turned: bool) -> None:
    storage = MemoryStorage()
    whole = Plain(MemoryStorage())
    whole.train(8)
    cut = Plain(storage)
    cut.train(at)
    cut.manager.save(wait=True)
    torch.rand(3)
    again = Plain(storage, turned=turned)
    again.net[0].bias.requires_grad_(True)
    found = again.manager.resume()
    assert found is not None
    assert found.step == again.manager.steps == at
    assert not again.net[0].bias.requires_grad
    again.train(8 - at)
    assert again.told == []
    assert all(torch.equal(v, again.weights()[k]) for k, v in whole.weights().items())
    assert float(again.net.seen) == 8
    assert again.scheduler.state_dict() == whole.scheduler.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_growing_run_goes_on_bit_for_bit(workers: int) -> None:
    whole = Training(MemoryStorage(), workers, every=10**9)
    whole.train()
    storage, steps, slept = MemoryStorage(), 0, False
    while steps < STEPS:  # killed in an epoch, at its end, asleep and awake
        one = Training(storage, workers, every=10**9)
        found = one.manager.resume()
        assert (found.step if found else 0) == steps
        one.train(until=min(steps + 40 - 13 * slept, STEPS))
        steps, slept = one.manager.steps, not slept
        if steps < STEPS:
            one.manager.save(wait=True)
        assert [event for event in one.events if event.kind == "warning"] == []
    assert one.digest() == whole.digest()
    assert len(one.growth.plans) > 1


class Slow(MemoryStorage):
    """Waits until it is told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.begun = threading.Event(), threading.Event()

    def put(self, name: str, parts: Mapping[str, Chunks]) -> None:
        self.begun.set()
        assert self.gate.wait(30)
        super().put(name, parts)


def test_of_snapshots_that_wait_only_the_newest_is_written() -> None:
    storage = Slow()
    run = Plain(storage, every=1)
    run.train(1)
    assert storage.begun.wait(30)
    run.train(4)  # training does not wait
    assert storage.names() == []
    storage.gate.set()
    run.manager.close()
    assert storage.names() == ["step-00000001", "step-00000005"]
    assert run.manager.writer.overtaken == 3
    assert (run.manager.written, len(run.manager.stalls)) == (2, 5)
    with pytest.raises(FinishedError, match=r"save\(\) after close\(\)"):
        run.manager.save()
    run.manager.close()


class Broken(MemoryStorage):
    """Fails on the calls it is told to."""

    failing = True

    def put(self, name: str, parts: Mapping[str, Chunks]) -> None:
        if self.failing:
            raise StateError(f"cannot keep {name}: No space left on device")
        super().put(name, parts)


def test_trouble_is_told_and_training_goes_on() -> None:
    storage = Broken()
    run = Plain(storage, every=2)
    run.train(5)
    run.manager.save(wait=True)
    assert run.manager.failures >= 1
    assert any("not written, training goes on: " in line and "No space" in line for line in run.told)
    storage.failing = False
    run.train(2)
    run.manager.close()
    assert storage.names() == ["step-00000007"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = Plain(tmp_path / "file", every=1)
    run.train(2)
    run.manager.close()
    assert any("cannot be listed" in line and "training goes on" in line for line in run.told)


def test_a_storage_that_cannot_be_listed_is_not_written_to() -> None:
    """It may hold another run's checkpoints, of which a fresh run would delete the later ones."""

    class Flaky(MemoryStorage):
        silent = False

        def names(self) -> list[str]:
            if self.silent:
                raise StoreError("cannot list keys in s3://bucket: ConnectTimeoutError")
            return super().names()

    storage = Flaky()
    first = Plain(storage, every=1, keep=None)
    first.train(3)
    first.manager.close()
    before = dict(storage.kept)
    storage.silent = True
    second = Plain(storage, every=1)
    second.train(2)
    second.manager.writer.flush()
    assert storage.kept == before
    assert sum("training goes on" in line for line in second.told) == 2
    storage.silent = False
    with pytest.raises(ConfigError, match="of another run"):
        second.train(1)


def test_what_cannot_be_kept_is_refused_by_save_and_told_by_step() -> None:
    run = Plain(MemoryStorage(), every=1)
    run.manager.run.config = {"made by": object()}
    run.train(1)
    assert any("/config/made by" in line for line in run.told)
    with pytest.raises(StateError, match="/config/made by"):
        run.manager.save()


def test_a_parameter_of_no_module_is_refused() -> None:
    net = nn.Linear(1, 1)
    stray = torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(StateError, match=r"'optimizer' has a parameter of shape \(3,\) in group 0"):
        CheckpointManager(MemoryStorage(), Run(net, stray)).save()


def test_latest_steps_back_past_damage_and_says_why(tmp_path: Path) -> None:
    run = Plain(tmp_path, every=1, keep=None)
    for _ in range(4):
        run.train(1)
        run.manager.writer.flush()
    run.manager.close()
    (tmp_path / "step-00000004" / "manifest.json").unlink()
    part = tmp_path / "step-00000003" / "tensors.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    again = Plain(tmp_path)
    found = again.manager.resume()
    assert found is not None
    assert found.step == 2
    assert len(again.told) == 2
    assert "manifest.json" in again.told[0]
    assert "step-00000003: tensors.safetensors is damaged: its SHA-256 digest is another" in again.told[1]
    again.train(1)
    again.manager.save(wait=True)  # takes the damaged one's place, and what came later goes
    assert FolderStorage(tmp_path).names() == [f"step-0000000{n}" for n in (1, 2, 3)]
    assert sound(FolderStorage(tmp_path), "step-00000003").step == 3
    assert "step-00000004 was deleted: the run goes on from an earlier step" in again.told


def test_retention_keeps_the_newest_and_the_best() -> None:
    storage = MemoryStorage()
    run = Plain(storage, keep=2, best=("score", "max"))
    for score in (0.1, 0.9, 0.3, float("nan"), 0.2):
        run.train(1)
        run.manager.save({"score": score}, wait=True)
    assert storage.names() == ["step-00000002", "step-00000004", "step-00000005"]
    again = Plain(storage, keep=1, best=("score", "max"))
    again.manager.resume()
    again.train(1)
    again.manager.save(wait=True)
    assert storage.names() == ["step-00000002", "step-00000006"]


def test_a_fresh_run_does_not_touch_another_runs_checkpoints() -> None:
    storage = MemoryStorage()
    first = Plain(storage)
    first.train(3)
    first.manager.save(wait=True)
    second = Plain(storage)
    with pytest.raises(ConfigError, match=r"holds step-00000003 of another run; call resume\(\)"):
        second.train(1)
    with pytest.raises(ConfigError):
        second.manager.save()
    assert storage.names() == ["step-00000003"]


def test_accumulation_is_never_cut(tmp_path: Path) -> None:
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    manager = CheckpointManager(tmp_path, Run(net, optimizer), every=1, keep=None)
    taken = []
    for index in range(9):
        net(torch.ones(1, 2)).sum().backward()
        if index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        taken.append(manager.step())
        manager.writer.flush()
    manager.close()
    assert taken == [False, False, True] * 3
    assert FolderStorage(tmp_path).names() == [f"step-0000000{n}" for n in (1, 2, 3)]


def test_other_settings_and_versions_are_told() -> None:
    storage = MemoryStorage()
    one = Plain(storage)
    one.manager.run.config = {"rate": 0.1, "same": 1}
    one.manager.save(wait=True)
    two = Plain(storage)
    two.manager.run.config = {"rate": 0.2, "same": 1}
    two.manager.resume()
    assert two.told == ["the run goes on from step-00000000, but config.rate was 0.1 and is 0.2"]


def test_groups_that_are_others_are_refused_by_name() -> None:
    storage = MemoryStorage()
    net = nn.Linear(2, 1)
    CheckpointManager(storage, Run(net, torch.optim.SGD(net.parameters(), lr=0.1))).save(wait=True)

    def resumed(optimizer: torch.optim.Optimizer) -> None:
        CheckpointManager(storage, Run(net, optimizer)).resume()

    with pytest.raises(StateError, match="is SGD, the run's Adam"):
        resumed(torch.optim.Adam(net.parameters()))
    with pytest.raises(
        StateError, match="the checkpoint's optimizer 'optimizer' has 'bias', the run's has not"
    ):
        resumed(torch.optim.SGD([net.weight], lr=0.1))
    with pytest.raises(StateError, match="has 2 groups, the checkpoint's 1"):
        resumed(torch.optim.SGD([{"params": [net.weight]}, {"params": [net.bias]}], lr=0.1))


def test_moments_keep_their_own_precision() -> None:
    """torch casts an optimizer's state to the parameter's type on load."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
        return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    net, optimizer = build()
    moment = torch.tensor([[1.0001, 2.0002]])
    optimizer.state[net.weight] = {"momentum_buffer": moment}
    storage = MemoryStorage()
    CheckpointManager(storage, Run(net, optimizer)).save(wait=True)
    net, optimizer = build()
    CheckpointManager(storage, Run(net, optimizer)).resume()
    assert torch.equal(optimizer.state[net.weight]["momentum_buffer"], moment)


class Raises(MemoryStorage):
    """Raises what no storage should."""

    def put(self, name: str, parts: Mapping[str, Chunks]) -> None:
        raise KeyError("odd")


def test_whatever_a_storage_raises_is_told_and_counted() -> None:
    run = Plain(Raises(), every=1)
    for _ in range(2):
        run.train(1)
        run.manager.writer.flush()
    run.manager.close()
    assert (run.manager.written, run.manager.failures) == (0, 2)
    assert any("not written, training goes on: KeyError: 'odd'" in line for line in run.told)


def test_a_state_that_cannot_be_asked_for_is_told_and_counted() -> None:
    run = Plain(MemoryStorage(), every=1)
    run.manager.run.others = {"odd": 3}  # type: ignore[assignment]
    run.train(2)
    assert run.manager.failures == 2
    assert any("AttributeError" in line for line in run.told)


@pytest.mark.parametrize("value", ["text", None, torch.zeros(3), {}])
def test_a_metric_that_is_no_number_is_told_and_not_known(value: Any) -> None:
    run = Plain(MemoryStorage())
    run.manager.save({"good": 1, "odd": value}, wait=True)
    assert sound(run.manager.storage, "step-00000000").metrics == {"good": 1.0, "odd": None}
    assert any("the metric 'odd' is" in line for line in run.told)


def test_sparse_and_meta_buffers_are_named_before_the_first_checkpoint() -> None:
    net = nn.Linear(2, 1)
    net.register_buffer("mask", torch.eye(3).to_sparse())
    net.register_buffer("later", torch.empty(3, device="meta"), persistent=False)
    told: list[str] = []
    run = Run(net, torch.optim.SGD(net.parameters(), lr=0.1))
    manager = CheckpointManager(
        MemoryStorage(), run, observe=lambda event: told.append(event.data["message"])
    )
    manager.step()
    assert [("'mask'" in line, "'later'" in line) for line in told] == [(True, False), (False, True)]
    assert "keep it dense, or out of the module's buffers" in told[0]


def test_a_second_manager_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    first = Plain(tmp_path / "kept", every=1)
    first.train(1)
    with pytest.raises(StateError, match=r"kept is in use by this process, since 20.*close"):
        Plain(tmp_path / "kept")
    first.manager.close()
    assert Plain(tmp_path / "kept").manager.resume() is not None


def test_a_last_save_is_tried_twice() -> None:
    storage = Broken()
    run = Plain(storage)
    run.train(1)

    def mend(event: Event) -> None:
        storage.failing = False

    assert run.manager.save_last() is None
    assert run.manager.failures == 2
    run.manager.observe = mend
    assert run.manager.save_last() == "step-00000001" == run.manager.last


@pytest.mark.parametrize(
    "options",
    [{"every": "3"}, {"every": True}, {"keep": 2.5}, {"keep": "x"}, {"best": "loss"}, {"failure_every": "x"}],
)
def test_options_of_another_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Plain(MemoryStorage(), **options)
    with pytest.raises(ConfigError, match="a folder, a URL or a Storage, not to 3"):
        Plain(3)
