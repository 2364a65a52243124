"""The signing key: made once, for its owner only, outside the store."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from esper.config import Config, load_config
from esper.errors import KernelError
from esper.tezzeret.signing import key_path, load_key, sign


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A sound key."""
    path = tmp_path / "data" / "kernel.key"
    load_key(path, create=True)
    return path


def test_a_key_is_made_once_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "data" / "esper" / "kernel.key"
    made = load_key(path, create=True)
    assert len(made) == 32
    assert load_key(path) == load_key(path, create=True) == made == path.read_bytes()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [entry.name for entry in path.parent.iterdir()] == ["kernel.key"]


def test_a_wide_umask_makes_no_wide_key(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        load_key(tmp_path / "kernel.key", create=True)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kernel.key").stat().st_mode) == 0o600


def test_two_keys_differ(tmp_path: Path) -> None:
    assert load_key(tmp_path / "a", create=True) != load_key(tmp_path / "b", create=True)


def test_all_who_come_at_once_get_the_same_key(tmp_path: Path) -> None:
    for turn in range(20):
        with ThreadPoolExecutor(8) as pool:
            keys = set(pool.map(lambda _: load_key(tmp_path / f"{turn}.key", create=True), range(8)))  # noqa: B023
        assert len(keys) == 1
    assert len(list(tmp_path.iterdir())) == 20


def test_a_missing_key_is_not_made_unasked(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"no signing key at .*ESPER_KERNEL_KEY=FILE"):
        load_key(tmp_path / "kernel.key")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o666])
def test_a_key_others_may_use_is_refused(key: Path, mode: int) -> None:
    key.chmod(mode)
    with pytest.raises(KernelError, match=r"others may use the key .* chmod 600"):
        load_key(key)


def test_a_link_is_refused(key: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.key"
    link.symlink_to(key)
    for create in (False, True):
        with pytest.raises(KernelError, match="symbolic link"):
            load_key(link, create=create)


def test_a_link_to_nowhere_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kernel.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KernelError, match="symbolic link"):
        load_key(tmp_path / "kernel.key", create=True)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("place", ["kernel.key", "ab/kernel.key", "../store/kernel.key"])
def test_a_key_inside_the_store_is_refused(tmp_path: Path, place: str) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with pytest.raises(KernelError, match="inside the store"):
        load_key(store / place, store=store, create=True)
    assert not list(store.iterdir())


def test_a_store_by_another_name_is_seen_through(key: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(key.parent)
    for path, store in [(tmp_path / "alias" / key.name, key.parent), (key, tmp_path / "alias")]:
        with pytest.raises(KernelError, match="inside the store"):
            load_key(path, store=store)
    assert load_key(key, store=tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"k" * 31, b"k" * 33, b"k" * 1000])
def test_a_damaged_key_is_refused(key: Path, content: bytes) -> None:
    key.write_bytes(content)
    with pytest.raises(KernelError, match="damaged"):
        load_key(key, create=True)
    assert key.read_bytes() == content


def test_a_folder_or_a_pipe_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name in ("folder", "pipe"):
        with pytest.raises(KernelError, match="is not a file"):
            load_key(tmp_path / name)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_key_is_refused(key: Path) -> None:
    os.chown(key, 12345, 12345)
    with pytest.raises(KernelError, match="another user"):
        load_key(key)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(KernelError, match=r"cannot use the key .*Not a directory"):
        load_key(tmp_path / "file" / "kernel.key", create=True)
    with pytest.raises(KernelError, match=r"cannot use the key /proc/none/kernel\.key"):
        load_key(Path("/proc/none/kernel.key"), create=True)


def test_the_variable_names_the_key_and_no_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_path() == tmp_path / ".local" / "share" / "esper" / "kernel.key"
    plain = Config()
    monkeypatch.setenv("ESPER_KERNEL_KEY", str(tmp_path / "mine.key"))
    monkeypatch.setenv("ESPER_KERNEL_STORE", str(tmp_path / "store"))
    assert key_path() == tmp_path / "mine.key"
    assert Config() == load_config({}) == plain


def test_signatures_depend_on_every_byte_and_the_key() -> None:
    key = b"k" * 32
    assert sign(key, b"ab", b"c") == sign(key, b"a", b"bc")
    assert len({sign(key, b"abc"), sign(key, b"abd"), sign(b"o" * 32, b"abc")}) == 3
