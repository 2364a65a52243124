"""The doors bench counts what comes out, tells once what is not Esper's, and sees what a call leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import doors
from benchmarks.door_calls import DOORS, Case
from benchmarks.door_values import net
from esper.errors import ConfigError


def test_every_door_is_tried_and_the_folder_is_gone() -> None:
    before = Path.cwd()
    tally = doors.run_seed(1, calls=60)
    assert {door for door, _ in tally.counts} == set(DOORS)
    assert Path.cwd() == before
    assert all(": HangError" not in key for key in tally.raw), tally.raw
    assert tally.changed == {}


def case(monkeypatch: pytest.MonkeyPatch, call: object) -> Case:
    monkeypatch.setitem(DOORS, "mine", (call, None, 1))
    return Case("mine", {"x": "\x1b" * 500}, net())


def test_a_raw_exception_is_told_once_with_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(_: Case) -> None:
        raise KeyError("x")

    tally = doors.Tally(0)
    for _ in range(3):
        doors.judge(tally, case(monkeypatch, call))
    assert tally.counts["mine", "raw"] == 3
    ((key, told),) = tally.raw.items()
    assert key == "mine: KeyError in outside"
    assert told.startswith("mine(x='\\x1b")
    assert len(told) < 120


@pytest.mark.parametrize("what", ["weights", "gradients", "classes", "hooks", "optimizer", "streams"])
def test_what_a_failed_call_leaves_behind_is_seen(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def call(one: Case) -> None:
        layer = one.model[0]
        leave = {
            "weights": lambda: layer.weight.data.add_(1),
            "gradients": lambda: layer.weight.sum().backward(),
            "classes": lambda: one.model.eval(),
            "hooks": lambda: layer.register_forward_hook(lambda *_: None),
            "optimizer": lambda: one.optimizer.register_step_post_hook(lambda *_: None),
            "streams": lambda: torch.rand(1),
        }
        leave[what]()
        raise ConfigError("no")

    tally = doors.Tally(0)
    doors.judge(tally, case(monkeypatch, call))
    assert list(tally.changed) == [f"mine: ConfigError left {what} changed"]


def test_a_call_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(_: Case) -> None:
        while True:
            pass

    monkeypatch.setattr(doors, "PATIENCE", 1)
    tally = doors.Tally(0)
    doors.judge(tally, case(monkeypatch, call))
    assert "HangError" in next(iter(tally.raw))


def test_a_raw_exception_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = doors.Tally(0, raw={"wrap: KeyError in outside": "wrap(x=1)"})
    monkeypatch.setattr(doors, "run_seed", lambda seed, calls: found)
    line = ["--quick", "--jobs", "0", "--json", "--out", str(tmp_path)]
    assert doors.main(line) == 1
    assert json.loads(capsys.readouterr().out)["raw"] == found.raw
