"""Every fault says what it breaks; what is measured follows from the marks alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.chaos import faults
from esper.chaos.child import FAULTS, Child
from esper.chaos.fault import Fault, Seen
from esper.chaos.faults.flipped_checkpoint import FlippedCheckpoint
from esper.chaos.faults.nan_batch import poisoned, undone
from esper.chaos.faults.truncated_checkpoint import TruncatedCheckpoint
from esper.chaos.measures import finite, lost, same, seconds
from esper.chaos.spec import Marks, Spec, read_marks
from esper.checkpoint import MemoryStorage
from esper.errors import CheckpointError

FOLDER = Path(faults.__path__[0])


def mark(at: float, kind: str, step: int = 0, attempt: int = 0, **facts: Any) -> dict[str, Any]:
    return {"at": at, "attempt": attempt, "kind": kind, "step": step, **facts}


def test_a_fault_is_a_file() -> None:
    assert FAULTS.names() == sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


@pytest.mark.parametrize("name", FAULTS.names())
def test_every_fault_says_what_it_breaks(name: str) -> None:
    fault = FAULTS.get(name)()
    assert isinstance(fault, Fault)
    assert 10 < len(fault.about) <= 90
    assert type(fault).judge is not Fault.judge


def test_a_restart_costs_the_steps_that_are_done_again() -> None:
    marks = [mark(1, "step", 1), mark(2, "step", 2), mark(3, "step", 3), mark(3.5, "fault", 3, what="")]
    marks += [mark(5, "begun", attempt=1), mark(7, "step", 2, 1), mark(8, "step", 3, 1)]
    assert lost(Seen(marks)) == 2
    assert seconds(Seen(marks)) == 3.5


def test_a_rollback_costs_what_the_governor_says_and_the_next_step_is_the_one_behind_it() -> None:
    back = mark(3.2, "event", 3, event="rolled_back", data={"to": 1, "lost": 2})
    alarm = {"alarm": "nonfinite", "signal": "loss", "action": "rollback"}
    marks = [mark(2, "step", 2), mark(2.5, "fault", 2, what=""), mark(3, "step", 3)]
    marks += [mark(3.1, "event", 3, event="alarm", data=alarm), back, mark(4, "step", 4)]
    seen = Seen(marks)
    assert lost(seen) == 2
    assert seconds(seen) == 1.5
    assert undone(seen).survived
    assert undone(seen).what == "loss nonfinite: rollback; rolled back to step 1"
    assert not undone(Seen(marks[:3])).survived


def test_without_a_fault_there_is_no_time() -> None:
    assert seconds(Seen([mark(1, "step", 1)])) is None


def test_a_batch_is_poisoned_where_it_holds_floating_numbers() -> None:
    x, y = torch.ones(2, 3), torch.arange(2)
    spoiled = poisoned({"x": x, "pair": (y, x)})
    assert spoiled["x"].isnan().all()
    assert spoiled["pair"][1].isnan().all()
    assert torch.equal(spoiled["pair"][0], y)
    assert torch.equal(x, torch.ones(2, 3))
    whole = (y, [y], "text")
    assert poisoned(whole) is whole


@pytest.mark.parametrize("fault", [FlippedCheckpoint(), TruncatedCheckpoint()])
@pytest.mark.parametrize("seed", range(5))
def test_damage_is_to_one_file_of_the_newest_checkpoint(fault: Fault, seed: int, tmp_path: Path) -> None:
    before = {}
    for step in ("step-00000001", "step-00000002"):
        (tmp_path / step).mkdir()
        for part in "ab":
            (tmp_path / step / part).write_bytes(bytes(range(50)))
            before[step, part] = bytes(range(50))
    assert fault.damage(tmp_path, random.Random(seed))
    after = {key: (tmp_path / key[0] / key[1]).read_bytes() for key in before}
    changed = [key for key in before if after[key] != before[key]]
    assert [step for step, _ in changed] == ["step-00000002"]


def test_nothing_is_damaged_where_nothing_is_kept(tmp_path: Path) -> None:
    assert FlippedCheckpoint().damage(tmp_path, random.Random(0)) is None


@pytest.mark.parametrize(("name", "words"), [("full_disk", "No space left"), ("read_only", "Read-only file")])
def test_where_nothing_can_be_mounted_the_storage_says_so(name: str, words: str, tmp_path: Path) -> None:
    files = {field: str(tmp_path / field) for field in ("run_dir", "marks", "weights")}
    child = Child(Spec("a:b", "c", fault=name, every=5, **files))
    storage = FAULTS.get(name)().storage(child, MemoryStorage())
    with pytest.raises(CheckpointError, match=words):
        storage.put("step-00000001", {"part": [b"1"]})
    assert storage.names() == []
    struck = Seen(read_marks(Path(child.spec.marks))).struck
    assert struck is not None
    assert "injected" in struck["what"]  # nobody is told that a disk was full


def test_a_kill_in_a_checkpoint_leaves_the_ones_before_it_alone(tmp_path: Path) -> None:
    files = {field: str(tmp_path / field) for field in ("run_dir", "marks", "weights")}
    later = Child(Spec("a:b", "c", fault="kill_in_checkpoint", at=5, **files))
    storage = FAULTS.get("kill_in_checkpoint")().storage(later, MemoryStorage())
    storage.put("step-00000001", {"part": [b"1"] * 50})  # before the fault's step
    assert storage.names() == ["step-00000001"]
    assert later.struck is False


def test_marks_outlive_their_writer(tmp_path: Path) -> None:
    Marks(tmp_path / "marks", 1)("step", 3, what="ü")
    Marks(tmp_path / "marks", 2)("step", 4)
    found = [(m["attempt"], m["kind"], m["step"]) for m in read_marks(tmp_path / "marks")]
    assert found == [(1, "step", 3), (2, "step", 4)]
    assert read_marks(tmp_path / "none") == []


def test_a_spec_is_read_as_it_was_written(tmp_path: Path) -> None:
    spec = Spec("a:b", "c", "d", "e", "f", fault="kill", growth={"governor": {"enabled": True}})
    spec.write(tmp_path / "spec")
    assert Spec.read(tmp_path / "spec") == spec


def test_weights_are_finite_where_all_are() -> None:
    assert finite({"w": torch.ones(2), "steps": torch.arange(3)})
    assert not finite({"w": torch.tensor([1.0, torch.inf])})


def test_equal_is_bit_for_bit() -> None:
    one = {"w": torch.ones(2)}
    assert same(one, {"w": torch.ones(2)})
    assert not same(one, {"w": torch.ones(2) + 1e-7})
    assert not same(one, {"v": torch.ones(2)})
