"""Checkpoints of this release stay readable, those of the future are refused, and no damage passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.checkpoint.format.manifest import MANIFEST, PARTS, canonical, damage, digest
from esper.checkpoint.format.reader import newest, read, sound, sound_among
from esper.errors import CheckpointError, StateError, StoreError
from esper.storage.folder import FolderStorage
from esper.storage.protocol import MemoryStorage
from tests.tolaria.checkpoint.killable import STEPS, Training

GOLDEN = Path(__file__).with_name("golden")  # format 1, written by esper 0.1.0: write_golden.py
NAMES = ["step-00000042", "step-00000063"]
FILES = [*PARTS, MANIFEST]


def golden() -> MemoryStorage:
    storage = MemoryStorage()
    for name in NAMES:
        storage.put(name, {part: [(GOLDEN / name / part).read_bytes()] for part in FILES})
    return storage


def test_golden_checkpoints_are_read() -> None:
    facts = json.loads((GOLDEN / "facts.json").read_text())
    for name in NAMES:
        found = read(golden(), name)
        weights = found.state["modules"][""]["state"]
        assert {k: float(v.double().sum()) for k, v in weights.items()} == facts[name]["sums"]
        assert [seed["stage"] for seed in json.loads(found.genome)["seeds"]] == facts[name]["stages"]
        assert found.state["batches"]["index"] == facts[name]["index"]
    assert facts[NAMES[0]]["stages"] != facts[NAMES[1]]["stages"]


@pytest.mark.parametrize("name", NAMES)
def test_runs_go_on_from_golden_checkpoints(name: str) -> None:
    """Bits depend on torch's version, so only that it goes on is asked."""
    run = Training(golden(), every=10**9)
    found = read(run.manager.storage, name)
    run.manager.restore(found)
    run.train(until=found.manifest.step + 30)
    assert run.manager.steps == found.manifest.step + 30
    assert found.manifest.step < STEPS


def resealed(facts: dict[str, Any], **changes: Any) -> bytes:
    """A manifest with other facts and a right digest, as whoever can write the folder could make one."""
    facts = {**facts, **changes}
    facts.pop("digest")
    return canonical({**facts, "digest": digest([canonical(facts)])})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, r"format version 2, this Esper reads version 1: update esper-morph"),
        ({"format": None}, "format version None"),
        ({"step": 43}, "holds the checkpoint of step 43: it was moved or swapped"),
        ({"more": 1}, "other fields"),
        ({"parts": {}}, "other parts"),
    ],
)
def test_manifests_of_another_kind_are_refused(changes: dict[str, Any], reason: str) -> None:
    storage = golden()
    kept = storage.kept[NAMES[0]]
    kept[MANIFEST] = resealed(json.loads(kept[MANIFEST]), **changes)
    with pytest.raises(StateError, match=reason):
        read(storage, NAMES[0])


def test_nobody_steps_back_past_a_version_to_come() -> None:
    """Who did would go on from the older one, and delete the newer one with its next checkpoint."""
    storage = golden()
    kept = storage.kept[NAMES[1]]
    kept[MANIFEST] = resealed(json.loads(kept[MANIFEST]), format=2)
    with pytest.raises(StateError, match=f"{NAMES[1]} has format version 2"):
        newest(storage, lambda line: None)
    kept[MANIFEST] = kept[MANIFEST].replace(b'"format": 2', b'"format": 3')  # a flipped bit: damage
    found = newest(storage, lambda line: None)
    assert found is not None
    assert found.manifest.name == NAMES[0]


def test_nobody_steps_back_past_a_storage_that_does_not_answer() -> None:
    class Silent(MemoryStorage):
        def get(self, name: str, part: str) -> bytes:
            raise StoreError("the bucket does not answer")

    storage = Silent()
    storage.kept = golden().kept
    with pytest.raises(StoreError):
        newest(storage, lambda line: None)
    with pytest.raises(StoreError):  # or all would be superfluous
        sound_among(storage, NAMES)


def flipped(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position % len(content)] ^= 1 << bit
    return bytes(changed)


DAMAGE = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 2**20), st.just(0)),
    st.tuples(st.just("grow"), st.binary(min_size=1, max_size=9), st.just(0)),
    st.tuples(st.just("swap"), st.just(0), st.just(0)),  # the same part of the other checkpoint
    st.tuples(st.just("mix"), st.sampled_from(FILES), st.just(0)),  # another part of this one
)


@settings(max_examples=300)
@given(st.sampled_from(FILES), DAMAGE)
def test_all_damage_is_refused_and_stepped_over(part: str, damaged: tuple[str, Any, int]) -> None:
    how, what, bit = damaged
    storage = golden()
    kept, other = storage.kept[NAMES[1]], storage.kept[NAMES[0]]
    before = kept[part]
    if how == "flip":
        kept[part] = flipped(before, what, bit)
    elif how == "cut":
        kept[part] = before[: what % len(before)]
    elif how == "grow":
        kept[part] = before + what
    elif how == "swap":
        kept[part] = other[part]
    else:
        kept[part] = kept[what]
    if kept[part] == before:
        return
    with pytest.raises(CheckpointError, match=NAMES[1]):
        sound(storage, NAMES[1])
    assert [found for found, _ in damage(storage, NAMES[1])][:1] == [part]
    told: list[str] = []
    found = newest(storage, told.append)
    assert found is not None
    assert found.manifest.name == NAMES[0]
    assert len(told) == 1


def test_whole_checkpoints_that_were_swapped_are_refused() -> None:
    storage = golden()
    storage.kept = dict(zip(NAMES, reversed(list(storage.kept.values())), strict=True))
    assert newest(storage, lambda line: None) is None


def test_a_part_that_is_missing_is_refused(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / NAMES[0], tmp_path / NAMES[0])
    for part in FILES:
        path = tmp_path / NAMES[0] / part
        content = path.read_bytes()
        path.unlink()
        assert [found for found, _ in damage(FolderStorage(tmp_path), NAMES[0])] == [part]
        path.mkdir()  # a folder in its place
        assert [found for found, _ in damage(FolderStorage(tmp_path), NAMES[0])] == [part]
        path.rmdir()
        path.write_bytes(content)
    assert not list(damage(FolderStorage(tmp_path), NAMES[0]))
