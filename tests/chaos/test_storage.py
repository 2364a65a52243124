"""A storage that fails on demand fails as a disk does: in the middle, and leaves nothing behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.chaos.storage import FaultyStorage, Verb
from esper.checkpoint import FolderStorage, MemoryStorage, Storage
from esper.errors import CheckpointError

PARTS = {"first": [b"one", b"two"], "second": [memoryview(b"three")]}
INNER: list[Callable[[Path], Storage]] = [FolderStorage, lambda path: MemoryStorage()]


def failing_at(nth: int, acts: list[Verb]) -> Callable[[Verb], None]:
    def trap(verb: Verb) -> None:
        acts.append(verb)
        if len(acts) == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return trap


@pytest.mark.parametrize("inner", INNER, ids=["folder", "memory"])
def test_without_a_fault_it_is_the_storage_it_is_around(
    inner: Callable[[Path], Storage], tmp_path: Path
) -> None:
    acts: list[Verb] = []
    storage = FaultyStorage(inner(tmp_path), failing_at(0, acts))
    storage.mend()
    storage.put("step-00000001", PARTS)
    assert storage.names() == ["step-00000001"]
    assert storage.get("step-00000001", "first") == b"onetwo"
    assert storage.get("step-00000001", "second") == b"three"
    storage.delete("step-00000001")
    assert storage.names() == []
    assert acts == ["mend", "write", "write", "write", "list", "read", "read", "delete", "list"]


@pytest.mark.parametrize("inner", INNER, ids=["folder", "memory"])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_error_at_any_piece_keeps_nothing_and_touches_nothing(
    inner: Callable[[Path], Storage], nth: int, tmp_path: Path
) -> None:
    storage = inner(tmp_path)
    storage.put("step-00000001", PARTS)
    with pytest.raises(CheckpointError, match="Input/output error"):
        FaultyStorage(storage, failing_at(nth, [])).put("step-00000002", PARTS)
    assert storage.names() == ["step-00000001"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert storage.get("step-00000001", "first") == b"onetwo"


def test_every_other_act_fails_in_words_of_our_own_tree(tmp_path: Path) -> None:
    storage = FaultyStorage(FolderStorage(tmp_path), failing_at(1, []))
    for act in (storage.mend, storage.names, lambda: storage.get("a", "b"), lambda: storage.delete("a")):
        storage.trap = failing_at(1, [])
        with pytest.raises(CheckpointError, match="Input/output error"):
            act()
