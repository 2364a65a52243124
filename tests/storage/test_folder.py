"""Folders and memory keep the one contract; a folder survives a writer that was killed anywhere."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from esper.errors import CheckpointError, StateError
from esper.storage import folder
from esper.storage.folder import FolderStorage, sync
from esper.storage.protocol import MemoryStorage, Storage

ONE, TWO = {"a.json": [b"1", b"23"], "z.json": [b""]}, {"a.json": [b"other"], "z.json": [memoryview(b"z")]}
HEX = "0" * 16


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return FolderStorage(tmp_path / "deep" / "kept") if request.param == "folder" else MemoryStorage()


def test_the_contract(storage: Storage) -> None:
    storage.mend()
    assert storage.names() == []
    storage.delete("step-1")
    storage.put("step-2", ONE)
    storage.put("step-1", TWO)
    assert storage.names() == ["step-1", "step-2"]
    assert (storage.get("step-2", "a.json"), storage.get("step-2", "z.json")) == (b"123", b"")
    storage.put("step-2", TWO)
    assert (storage.get("step-2", "a.json"), storage.get("step-2", "z.json")) == (b"other", b"z")
    for missing in (("step-3", "a.json"), ("step-2", "b.json")):
        with pytest.raises(StateError, match=missing[1]):
            storage.get(*missing)
    storage.delete("step-2")
    assert storage.names() == ["step-1"]


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "", "A", "a" * 65])
def test_names_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    storage = FolderStorage(tmp_path / "kept")
    with pytest.raises(StateError, match="is not a"):
        storage.put(name, ONE)
    with pytest.raises(StateError, match="is not a"):
        storage.get("step-1", name)
    with pytest.raises(StateError, match="is not a"):
        storage.delete(name)


def test_links_are_not_followed(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "kept")
    storage.put("step-1", ONE)
    part = tmp_path / "kept" / "step-1" / "a.json"
    part.unlink()
    part.symlink_to("/etc/hostname")
    with pytest.raises(StateError, match="it is a link"):
        storage.get("step-1", "a.json")
    (tmp_path / "kept" / "step-2").symlink_to(tmp_path / "kept" / "step-1")
    with pytest.raises(StateError, match="is a link"):
        storage.get("step-2", "z.json")


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    storage.put("step-1", ONE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may be larger
        with pytest.raises(StateError, match=r"cannot keep step-1 in .*: File too large"):
            storage.put("step-1", {"a.json": [b"x" * 600, b"y" * 600]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert storage.get("step-1", "a.json") == b"123"
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_every_new_name_is_synced_from_the_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose own name is not durable takes what lies in it along when the power fails."""
    synced: list[Path] = []

    def noted(path: Path) -> None:
        synced.append(path)
        sync(path)

    monkeypatch.setattr(folder, "sync", noted)
    storage = FolderStorage(tmp_path / "run" / "kept")
    storage.put("step-1", ONE)
    assert {tmp_path, tmp_path / "run", tmp_path / "run" / "kept"} <= set(synced)
    assert synced[-2].suffix == ".draft"  # the names of the parts, before they are published
    assert synced[-1] == tmp_path / "run" / "kept"
    synced.clear()
    storage.put("step-2", ONE)
    assert tmp_path not in synced
    for change in (
        lambda: storage.put("step-2", TWO),
        lambda: storage.delete("step-2"),
        lambda: ((tmp_path / "run" / "kept" / f".step-3.{HEX}.draft").mkdir(), storage.mend()),
    ):
        synced.clear()
        change()
        assert tmp_path / "run" / "kept" in synced
    synced.clear()
    storage.mend()
    assert synced == []


def test_a_file_in_the_folders_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for storage in (FolderStorage(tmp_path / "file"), FolderStorage(tmp_path / "file" / "below")):
        with pytest.raises(StateError, match="cannot keep step-1"):
            storage.put("step-1", ONE)


def test_what_the_folder_refuses_is_told_as_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    storage = FolderStorage(tmp_path / "file")
    assert str(storage) == str(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"cannot list .*file: Not a directory"):
        storage.names()
    with pytest.raises(CheckpointError, match=r"cannot delete .*step-1: Not a directory"):
        storage.delete("step-1")
    with pytest.raises(CheckpointError, match=r"cannot read .*a.json: Not a directory"):
        storage.get("step-1", "a.json")
    (tmp_path / f".step-1.{HEX}.draft").write_text("a file, which no writer of ours left")
    with pytest.raises(CheckpointError, match=r"cannot mend .*: Not a directory"):
        FolderStorage(tmp_path).mend()


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_replacement_that_fails_at_any_rename_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    storage = FolderStorage(tmp_path)
    storage.put("step-1", ONE)
    done, rename = [0], Path.rename

    def failing_once(path: Path, target: Path) -> Path:
        done[0] += 1
        if done[0] == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing_once)
    with pytest.raises(CheckpointError, match=r"cannot keep step-1 in .*: Input/output error"):
        storage.put("step-1", TWO)
    assert storage.get("step-1", "a.json") == b"123"
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    lease = storage.lease()
    with pytest.raises(StateError, match=rf"^{tmp_path} is in use by this process.* or give another folder"):
        storage.lease()
    lease.release()
    storage.lease().release()
    with pytest.raises(StateError, match=r"'a\\x00b': .*null"):
        FolderStorage("a\0b").lease()


@pytest.mark.parametrize(
    ("left", "found"),
    [
        ({f".step-1.{HEX}.draft": b"new"}, None),  # killed while writing
        ({f".step-1.{HEX}.draft": b"new", "step-1": b"old"}, b"old"),
        ({f".step-1.{HEX}.ready": b"new", "step-1": b"old"}, b"old"),  # before the first rename
        ({f".step-1.{HEX}.ready": b"new", f".step-1.{HEX}.old": b"old"}, b"new"),  # between the two
        ({f".step-1.{HEX}.old": b"old", "step-1": b"new"}, b"new"),  # behind the second
        ({f".step-1.{HEX}.old": b"old"}, b"old"),
        (  # between the two, and an earlier replacement was killed while it removed what it replaced
            {
                f".step-1.{'f' * 16}.old": b"older",
                f".step-1.{HEX}.ready": b"new",
                f".step-1.{HEX}.old": b"old",
            },
            b"new",
        ),
    ],
)
def test_a_kill_at_any_instant_is_mended(tmp_path: Path, left: dict[str, bytes], found: bytes | None) -> None:
    for name, content in left.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.json").write_bytes(content)
    storage = FolderStorage(tmp_path)
    assert storage.names() == ["step-1"] * ("step-1" in left)
    storage.mend()
    assert storage.names() == ["step-1"] * (found is not None)
    if found is not None:
        assert storage.get("step-1", "a.json") == found
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_writer_leaves_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: set[str] = set()

    def noted(path: Path) -> None:
        hidden.update(found.name for found in tmp_path.glob(".*"))
        sync(path)

    monkeypatch.setattr(folder, "sync", noted)
    storage = FolderStorage(tmp_path)
    storage.put("step-1", ONE)
    storage.put("step-1", TWO)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    storage.delete("step-1")
    assert {name.rsplit(".")[-1] for name in hidden} == {"draft", "old"}
    for name in hidden - {name for name in hidden if name.endswith("old")}:
        (tmp_path / name).mkdir()
    storage.mend()
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(20)
def test_only_a_file_is_a_part(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    storage.put("step-1", ONE)
    (tmp_path / "step-1" / "a.json").unlink()
    os.mkfifo(tmp_path / "step-1" / "a.json")  # to open it would wait for a writer
    with pytest.raises(CheckpointError, match=r"a\.json is not a file"):
        storage.get("step-1", "a.json")
    (tmp_path / "step-2").write_text("a file in a checkpoint's place")
    (tmp_path / "Step").mkdir()
    assert storage.names() == ["step-1"]
