"""Checkpoints of this release stay readable, those of the future are refused, and no damage passes."""

from __future__ import annotations

import json
import math
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.checkpoint.format.manifest import (
    GENOME,
    MANIFEST,
    PARTS,
    STATE,
    TENSORS,
    Manifest,
    canonical,
    damage,
    digest,
    inflated,
    name_of,
    numbers,
    parts_of,
    read_manifest,
    safetensors_chunks,
    step_of,
)
from esper.checkpoint.format.reader import newest, read, sound, sound_among
from esper.errors import CheckpointError, StateError, StoreError
from esper.storage.folder import FolderStorage
from esper.storage.protocol import MemoryStorage
from tests.checkpoint.killable import STEPS, Training

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


PART = {"size": 1, "sha256": "0" * 64}
ODD_PARTS: list[Any] = [
    "x",
    {**PART, "more": 1},
    {"size": 1},
    {**PART, "size": -1},
    {**PART, "size": True},
    {**PART, "sha256": 1},
    {**PART, "sha256": "0" * 63},
    {**PART, "sha256": "0" * 65},
    {**PART, "sha256": "A" * 64},
]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, r"format version 2, this Esper reads version 1: update esper-morph"),
        ({"format": None}, "format version None"),
        ({"format": True}, "format version True"),
        ({"format": 1.0}, r"format version 1\.0"),
        ({"step": 43}, "holds the checkpoint of step 43: it was moved or swapped"),
        ({"more": 1}, "other fields"),
        ({"parts": {}}, "other parts"),
        ({"parts": []}, "other fields"),
        *(({"parts": dict.fromkeys(PARTS, odd)}, "other parts") for odd in ODD_PARTS),
    ],
)
def test_manifests_of_another_kind_are_refused(changes: dict[str, Any], reason: str) -> None:
    storage = golden()
    kept = storage.kept[NAMES[0]]
    kept[MANIFEST] = resealed(json.loads(kept[MANIFEST]), **changes)
    with pytest.raises(StateError, match=reason):
        read(storage, NAMES[0])


@pytest.mark.parametrize("part", PARTS)
def test_one_odd_part_is_enough(part: str) -> None:
    storage = golden()
    kept = storage.kept[NAMES[0]]
    facts = json.loads(kept[MANIFEST])
    kept[MANIFEST] = resealed(facts, parts={**facts["parts"], part: {**PART, "size": -1}})
    with pytest.raises(CheckpointError, match="lists other parts"):
        read_manifest(storage, NAMES[0])


def test_a_manifest_is_read_in_the_form_it_is_written_in_only() -> None:
    """White space and NaN change no fact, so that no digest of the facts would find them."""
    storage = golden()
    kept = storage.kept[NAMES[0]]
    whole = kept[MANIFEST]
    facts = json.loads(whole)
    del facts["digest"]
    facts["metrics"] = {"loss": math.nan}
    text = json.dumps(facts, sort_keys=True, indent=1).encode()
    sealed = json.dumps({**facts, "digest": digest([text])}, sort_keys=True, indent=1).encode()
    for spoilt in (whole + b"\n", whole.replace(b": ", b":", 1), sealed):
        kept[MANIFEST] = spoilt
        with pytest.raises(CheckpointError, match="is damaged: its SHA-256 digest is another"):
            read_manifest(storage, NAMES[0])


def test_a_manifest_knows_how_large_its_checkpoint_is() -> None:
    for name in NAMES:
        parts = [(GOLDEN / name / part).read_bytes() for part in PARTS]
        assert read_manifest(golden(), name).size == sum(map(len, parts))


def test_a_state_is_compressed_and_the_rest_lies_as_it_is() -> None:
    skeleton = {"list": list(range(1000))}
    parts = parts_of(Manifest(1, 0.0, {}, {}, {}), b"{}", skeleton, {"a": torch.ones(2)})
    (state,) = parts[STATE]
    assert json.loads(zlib.decompress(state)) == skeleton
    assert 2 * len(state) < len(json.dumps(skeleton))
    assert list(parts) == [GENOME, STATE, TENSORS, MANIFEST]
    assert parts[GENOME] == [b"{}"]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-00000000", 0),
        ("step-00000123", 123),
        ("step-123456789", 123456789),
        ("step-000000123", None),
        ("step-123", None),
        ("step-00000123-shard", None),
    ],
)
def test_only_the_name_a_step_is_given_says_which_it_is(name: str, step: int | None) -> None:
    assert step_of(name) == step
    assert step is None or name_of(step) == name


@pytest.mark.parametrize("text", [b"", b"[]", b"x"])
def test_a_manifest_that_is_no_object_is_damaged(text: bytes) -> None:
    storage = golden()
    storage.kept[NAMES[0]][MANIFEST] = text
    with pytest.raises(CheckpointError, match=f"{NAMES[0]}: {MANIFEST} is damaged: it is not"):
        read(storage, NAMES[0])


def test_metrics_are_numbers_or_unknown() -> None:
    given = {"a": 1, "b": torch.tensor(2.5, requires_grad=True), "c": math.nan, 3: -math.inf, "d": "x"}
    found, strange = numbers({**given, "e": torch.ones(2), "f": 10**400})
    assert found == {"a": 1.0, "b": 2.5, "c": None, "3": None, "d": None, "e": None, "f": None}
    assert [line.split("'")[1] for line in strange] == ["d", "e", "f"]
    found, (line,) = numbers([1])
    assert (found, line[:15]) == ({}, "metrics are [1]")


def test_every_tensor_lies_at_a_multiple_of_its_numbers_size() -> None:
    """Whoever maps the file reads it in place."""
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(2, dtype=torch.float64),
        "c": torch.ones(1),
    }
    for longer in range(8):  # the header has any length, and what follows it begins at a multiple of eight
        named = {name + "x" * longer * (name == "a"): tensor for name, tensor in tensors.items()}
        content = b"".join(safetensors_chunks(named))
        begin = 8 + int.from_bytes(content[:8], "little")
        assert begin % 8 == 0
        header = json.loads(content[8:begin])
        for name, tensor in named.items():
            assert (begin + header[name]["data_offsets"][0]) % tensor.itemsize == 0
            assert torch.equal(safetensors.torch.load(content)[name], tensor)


def of_ratio(ratio: float) -> bytes:
    """A text of some megabytes that is so many times as long as what it is compressed to."""
    noise = random.Random(0).randbytes(100_000)
    size = len(noise)
    for _ in range(5):
        text = noise + b" " * (size - len(noise))
        size = int(ratio * len(zlib.compress(text, 1)))
    return text


@pytest.mark.parametrize(
    ("text", "level", "reason"),
    [
        (b" " * (1 << 20), 1, None),  # a small part: 1 MiB
        (b" " * ((1 << 20) + 1), 1, f"becomes over {1 << 20} bytes"),
        (of_ratio(31.9), 1, None),  # a large one: 32 times its size
        (of_ratio(32.1), 1, "becomes over"),
        (b"," * (1 << 24), 0, None),  # and 16 Mi values
        (b"," * (1 << 24) + b"[", 0, "values"),
        (b"[" * (1 << 24) + b"{", 0, "values"),
        (b"{" * (1 << 24) + b",", 0, "values"),
    ],
    ids=["small", "small+1", "large", "larger", "most", "one more list", "one more object", "one more"],
)
def test_a_state_becomes_no_more_than_memory_should_hold(text: bytes, level: int, reason: str | None) -> None:
    content = zlib.compress(text, level)
    if reason is None:
        assert inflated(content, "it") == text
    else:
        with pytest.raises(CheckpointError, match=rf"it: state\.json\.zlib .*{reason}"):
            inflated(content, "it")


def test_no_state_becomes_more_than_a_quarter_of_a_gigabyte() -> None:
    """However large it is: nine megabytes alone could become 288."""
    content = zlib.compress(random.Random(0).randbytes(9 << 20), 0)
    assert len(inflated(content, "it")) == 9 << 20
    with pytest.raises(CheckpointError, match=f"becomes over {1 << 28} bytes"):
        inflated(content[:-1], "it")


@pytest.mark.parametrize("content", [b"plain", zlib.compress(b"{}")[:-1], zlib.compress(b"{}") + b"x", b""])
def test_a_state_is_one_whole_stream(content: bytes) -> None:
    said = "is not in the format it claims" if content == b"plain" else "is cut short"
    with pytest.raises(CheckpointError, match=f"it.* {said}"):
        inflated(content, "it")


def test_shards_are_looked_at_too() -> None:
    storage, content = golden(), b"of one process"
    shard = {"name": "shard-0", "size": len(content), "sha256": digest([content])}
    kept = storage.kept[NAMES[0]]
    kept[MANIFEST] = resealed(json.loads(kept[MANIFEST]), summary={"shards": [shard]})
    assert [name for name, _ in damage(storage, NAMES[0])] == ["shard-0"]  # it is missing
    storage.put("shard-0", {TENSORS: [content]})
    assert not list(damage(storage, NAMES[0]))
    for spoilt in (content + b"!", content[:-1] + b"!"):
        storage.put("shard-0", {TENSORS: [spoilt]})
        assert [name for name, _ in damage(storage, NAMES[0])] == ["shard-0"]


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


def test_how_a_part_is_damaged_is_told() -> None:
    storage = golden()
    kept = storage.kept[NAMES[0]]
    whole = kept[TENSORS]
    for spoilt, said in (
        (whole[:-1], f"it has {len(whole) - 1} bytes, the manifest says {len(whole)}"),
        (flipped(whole, 99, 0), "its SHA-256 digest is another"),
    ):
        kept[TENSORS] = spoilt
        assert list(damage(storage, NAMES[0])) == [(TENSORS, f"{NAMES[0]}: {TENSORS} is damaged: {said}")]


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
