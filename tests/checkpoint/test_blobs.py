"""Checkpoints in a bucket: a kill leaves an orphan, two writers find out, and a run goes on from a URL."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.checkpoint import (
    BlobStorage,
    CheckpointManager,
    FolderStorage,
    MemoryStorage,
    Run,
    storage_at,
)
from esper.errors import CheckpointError, RegistryError, StoreError
from esper.storage.address import STORES
from esper.testing.storages import DEMANDS, check_storage
from esper.urza.blobs.memory import MemoryStore
from tests.urza.blobs.serving import ACCOUNT, BUCKET, s3_server

ONE, TWO = {"a.json": [b"1", b"23"], "z.json": [b""]}, {"a.json": [b"other"], "z.json": [b"z"]}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as served:
        yield served


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Gives URLs of places where nothing is yet."""
    facts = {**ACCOUNT, "AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL_S3": endpoint}
    files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), "/dev/null")
    for name, value in {**facts, **files}.items():
        monkeypatch.setenv(name, value)
    return lambda: f"s3://{BUCKET}/{secrets.token_hex(4)}"


HELD = [(name.replace("_", " "), True) for name in DEMANDS]


def test_a_folder_and_a_process_keep_the_contract(tmp_path: Path) -> None:
    assert check_storage(lambda: storage_at(tmp_path / secrets.token_hex(4) / "kept")) == HELD
    assert check_storage(MemoryStorage) == HELD


@pytest.mark.parametrize("name", STORES.names())
def test_every_blob_store_keeps_the_contract(name: str, tmp_path: Path, bucket: Callable[[], str]) -> None:
    """One that needs no server is given a path of its own."""
    asked: dict[str, Callable[[], str]] = {"s3": bucket}
    place = asked.get(name, lambda: f"{name}://{tmp_path / secrets.token_hex(4)}")
    assert check_storage(lambda: storage_at(place())) == HELD


def test_the_suite_finds_what_it_is_for() -> None:
    class Careless(MemoryStorage):
        def put(self, name: str, parts: object) -> None:
            self.kept.setdefault(name, {}).update({k: b"".join(v[:1]) for k, v in parts.items()})

        def get(self, name: str, part: str) -> bytes:
            return self.kept.get(name, {}).get(part, b"")

        def delete(self, name: str) -> None:
            pass

    assert {name for name, held in check_storage(Careless) if not held} == {
        "parts come back end to end",
        "a replacement replaces all",
        "what is missing is an error",
        "what is deleted is gone",
        "names cannot lead elsewhere",
    }


class Killed(MemoryStore):
    """Ends, as a process would, before the n-th write."""

    left = 10**9

    def put(self, key: str, content: Sequence[bytes | memoryview]) -> None:
        self._write()
        super().put(key, content)

    def swap(self, key: str, old: bytes | None, new: bytes) -> bool:
        self._write()
        return super().swap(key, old, new)

    def delete(self, key: str) -> None:
        self._write()
        super().delete(key)

    def _write(self) -> None:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1


@pytest.mark.parametrize("writes", range(6))
def test_a_kill_at_any_write_leaves_the_old_or_the_new(writes: int) -> None:
    blobs = Killed()
    storage = BlobStorage(blobs)
    storage.put("step-1", ONE)
    blobs.left = writes
    try:
        storage.put("step-1", TWO)
    except KeyboardInterrupt:
        assert writes < 5
    again = BlobStorage(blobs)
    blobs.left = 10**9
    want = b"other" if writes > 2 else b"123"  # two parts, then the commit
    assert again.get("step-1", "a.json") == want
    again.mend()
    assert again.get("step-1", "a.json") == want
    assert len(blobs.kept) == 3


@pytest.mark.parametrize("writes", range(3))
def test_a_kill_while_deleting_leaves_orphans_that_mend_removes(writes: int) -> None:
    blobs = Killed()
    storage = BlobStorage(blobs)
    storage.put("step-1", ONE)
    blobs.left = writes
    with pytest.raises(KeyboardInterrupt):
        storage.delete("step-1")
    blobs.left = 10**9
    assert storage.names() == ["step-1"] * (writes == 0)
    storage.mend()
    assert len(blobs.kept) == (3 if writes == 0 else 0)


def test_a_first_put_that_fails_leaves_nothing() -> None:
    class Full(MemoryStore):
        def put(self, key: str, content: Sequence[bytes | memoryview]) -> None:
            if key.endswith("z.json"):
                raise StoreError("cannot put: QuotaExceeded")
            super().put(key, content)

    storage = BlobStorage(Full())
    with pytest.raises(StoreError):
        storage.put("step-1", ONE)
    assert storage.names() == []
    assert storage.blobs.keys() == []


def test_a_commit_whose_answer_was_lost_keeps_its_parts() -> None:
    class Mute(MemoryStore):
        def swap(self, key: str, old: bytes | None, new: bytes) -> bool:
            super().swap(key, old, new)
            raise StoreError("cannot put commit: ReadTimeoutError")

    storage = BlobStorage(Mute())
    with pytest.raises(StoreError):
        storage.put("step-1", ONE)
    storage.mend()
    assert storage.get("step-1", "a.json") == b"123"


def test_a_second_writer_finds_out() -> None:
    class Shared(MemoryStore):
        other: BlobStorage | None = None

        def put(self, key: str, content: Sequence[bytes | memoryview]) -> None:
            super().put(key, content)
            other, self.other = self.other, None
            if other is not None:
                other.put("step-1", TWO)

    blobs = Shared()
    storage = BlobStorage(blobs)
    blobs.other = BlobStorage(blobs)
    with pytest.raises(CheckpointError, match="another process writes there"):
        storage.put("step-1", ONE)
    assert storage.get("step-1", "a.json") == b"other"
    assert len(blobs.kept) == 3


def test_a_damaged_commit_is_damage() -> None:
    blobs = MemoryStore()
    storage = BlobStorage(blobs)
    storage.put("step-1", ONE)
    for harm in (b"", b"0" * 16, b"../../../../etc/x\n", blobs.kept["step-1/commit"].upper() + b"A"):
        blobs.kept["step-1/commit"] = harm
        with pytest.raises(CheckpointError, match="step-1: commit is damaged"):
            storage.get("step-1", "a.json")
    storage.mend()
    assert len(blobs.kept) == 3  # whoever can, may still save the parts
    storage.delete("step-1")
    assert blobs.kept == {}


def test_places_are_told_apart(tmp_path: Path) -> None:
    memory = MemoryStorage()
    assert storage_at(memory) is memory
    for path in (tmp_path, str(tmp_path)):
        found = storage_at(path)
        assert isinstance(found, FolderStorage)
        assert found.folder == tmp_path
    with pytest.raises(RegistryError, match="no 'gopher'; known: memory, s3"):
        storage_at("gopher://x")


def test_a_run_goes_on_from_a_bucket(bucket: Callable[[], str]) -> None:
    url = bucket()

    def trained(steps: int) -> tuple[nn.Module, int]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1))
        optimizer = torch.optim.Adam(net.parameters())
        with CheckpointManager(storage_at(url), Run(net, optimizer), every=10**9, keep=2) as manager:
            found = manager.resume()
            while manager.steps < steps:
                optimizer.zero_grad()
                net(torch.randn(8, 4)).square().mean().backward()
                optimizer.step()
                manager.step()
            manager.save(wait=True)
            assert manager.failures == 0
            assert manager.written == 1
        return net, 0 if found is None else found.step

    assert [trained(steps)[1] for steps in (3, 5, 9)] == [0, 3, 5]
    cut, _ = trained(9)
    assert storage_at(url).names() == ["step-00000005", "step-00000009"]
    url = bucket()
    whole, _ = trained(9)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in cut.state_dict().items())
