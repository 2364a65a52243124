"""A folder of containers: whole or absent, under plain ids, without links."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts import KernelStore
from esper.errors import KernelError
from esper.urza.folder import FolderStore, default_folder

ID, OTHER = "ab" + "0" * 62, "ab" + "1" * 62


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    """An empty store, whose folder does not exist yet."""
    return FolderStore(tmp_path / "store")


def test_what_is_put_is_got(store: FolderStore) -> None:
    kept: KernelStore = store
    assert kept.get(ID) is None
    assert kept.ids() == []
    kept.put(ID, b"one")
    kept.put(OTHER, b"")
    kept.put("cd" * 32, bytes(100_000))
    kept.put(ID, b"one")
    assert kept.get(ID) == b"one"
    assert kept.get(OTHER) == b""
    assert kept.ids() == [ID, OTHER, "cd" * 32]
    assert FolderStore(store.folder).get(ID) == b"one"


def test_a_container_lies_below_the_first_digits_of_its_id(store: FolderStore) -> None:
    store.put(ID, b"one")
    assert [
        path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file()
    ] == [f"ab/{ID}.kernel"]


def test_a_damaged_entry_is_replaced(store: FolderStore) -> None:
    store.put(ID, b"one")
    (store.folder / "ab" / f"{ID}.kernel").write_bytes(b"torn")
    store.put(ID, b"one")
    assert store.get(ID) == b"one"


BAD = [
    "",
    "ab",
    "../" + "0" * 61,
    "/" + "0" * 63,
    ID.upper(),
    ID + "\n",
    ID + "0",
    "ab/" + "0" * 61,
    "\0" * 64,
]
FULL_WIDTH = "\uff10" * 64


@pytest.mark.parametrize("kernel", [*BAD, FULL_WIDTH])
def test_what_is_no_id_touches_no_file(store: FolderStore, kernel: str) -> None:
    for ask in (lambda: store.get(kernel), lambda: store.put(kernel, b"x")):
        with pytest.raises(KernelError, match="no kernel's id"):
            ask()
    assert not store.folder.exists()


@given(st.text(max_size=70))
def test_any_other_text_is_no_id(text: str) -> None:
    with pytest.raises(KernelError, match="no kernel's id"):
        FolderStore("/nonexistent").get(text)


def test_a_link_in_a_containers_place_is_refused_and_replaced(store: FolderStore, tmp_path: Path) -> None:
    store.put(OTHER, b"x")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (store.folder / "ab" / f"{ID}.kernel").symlink_to(secret)
    with pytest.raises(KernelError, match="a link"):
        store.get(ID)
    assert store.ids() == [ID, OTHER]  # so that it is seen
    store.put(ID, b"one")
    assert store.get(ID) == b"one"
    assert secret.read_bytes() == b"secret"


def test_a_link_in_a_folders_place_is_refused(store: FolderStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{ID}.kernel").write_bytes(b"planted")
    store.folder.mkdir()
    (store.folder / "ab").symlink_to(outside)
    for ask in (lambda: store.get(ID), lambda: store.put(ID, b"x"), store.ids):
        with pytest.raises(KernelError, match="a link"):
            ask()
    assert [path.name for path in outside.iterdir()] == [f"{ID}.kernel"]
    assert (outside / f"{ID}.kernel").read_bytes() == b"planted"


def test_the_store_itself_may_be_reached_by_a_link(store: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    store.folder.symlink_to(tmp_path / "disk")
    store.put(ID, b"one")
    assert store.get(ID) == b"one"


def test_a_pipe_or_a_giant_is_refused_without_reading_it(store: FolderStore) -> None:
    store.put(OTHER, b"x")
    os.mkfifo(store.folder / "ab" / f"{ID}.kernel")
    os.truncate(store.folder / "ab" / f"{OTHER}.kernel", (1 << 30) + 1)
    for kernel in (ID, OTHER):
        with pytest.raises(KernelError, match="no file, or one over 1 GiB"):
            store.get(kernel)


def test_other_files_are_not_listed(store: FolderStore) -> None:
    store.put(ID, b"one")
    for name in ("kernel.txt", f"ab/.{ID}.kernel.0123", "ab/x.kernel", f"ab/{'c' * 64}.kernel", f"ab/{ID}"):
        (store.folder / name).write_bytes(b"")
    assert store.ids() == [ID]


def test_a_write_that_fails_leaves_what_was_there(store: FolderStore) -> None:
    store.put(ID, b"one")
    code = (
        "import resource, signal, sys\n"
        "from esper.errors import KernelError\n"
        "from esper.urza.folder import FolderStore\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # the disk is full after 1,000 bytes
        "try: FolderStore(sys.argv[1]).put(sys.argv[2], bytes(100_000))\n"
        "except KernelError as error: assert 'cannot keep kernel' in str(error), error\n"
        "else: raise SystemExit('it was kept')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(store.folder), ID], check=True)
    assert store.get(ID) == b"one"
    assert [path.name for path in (store.folder / "ab").iterdir()] == [f"{ID}.kernel"]


def test_a_place_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    store = FolderStore(tmp_path / "store")
    for ask in (lambda: store.get(ID), lambda: store.put(ID, b"x"), store.ids):
        with pytest.raises(KernelError, match=r"cannot (read|keep|list) .*store"):
            ask()


def test_readers_and_writers_at_once_see_whole_containers(store: FolderStore) -> None:
    whole = {bytes([value]) * 50_000 for value in range(8)}

    def write(content: bytes) -> None:
        for _ in range(5):
            store.put(ID, content)

    with ThreadPoolExecutor(8) as pool:
        writers = [pool.submit(write, content) for content in whole]
        while not all(writer.done() for writer in writers):
            assert store.get(ID) in whole | {None}
        for writer in writers:
            writer.result()
    assert store.get(ID) in whole
    assert [path.name for path in (store.folder / "ab").iterdir()] == [f"{ID}.kernel"]


def test_processes_at_once_lose_nothing(store: FolderStore) -> None:
    code = (
        "import sys\n"
        "from esper.urza.folder import FolderStore\n"
        "for n in range(20): FolderStore(sys.argv[1]).put(f'{n:064x}', bytes([n]) * 1000)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(store.folder)]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert store.ids() == [f"{n:064x}" for n in range(20)]
    assert all(store.get(f"{n:064x}") == bytes([n]) * 1000 for n in range(20))


def test_the_default_is_in_the_home_or_where_the_variable_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".local" / "share" / "esper" / "kernels"
    monkeypatch.setenv("ESPER_KERNEL_STORE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
