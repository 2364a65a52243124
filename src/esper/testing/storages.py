"""The storage suite: what every place must hold that keeps checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from esper.errors import CheckpointError, StateError
from esper.storage.protocol import Storage

NAMES = ("step-00000001", "step-00000002")
ONE = {"a.json": [b"1", memoryview(b"23")], "z.json": [b""]}
TWO = {"a.json": [b"other"], "z.json": [b"z"]}
HOSTILE = ("..", ".hidden", "a/b", "", "A", "a" * 65, "a\n")


def check_storage(new: Callable[[], Storage]) -> list[tuple[str, bool]]:
    """Hold a storage to every demand of its contract.

    Args:
        new: Function that returns an empty storage, another one each time.

    Returns:
        Each demand, and whether it holds.
    """
    return [(name.replace("_", " "), demand(new())) for name, demand in DEMANDS.items()]


def an_empty_one_is_empty(storage: Storage) -> bool:
    """A fresh storage lists nothing, and mending or deleting nothing is no error."""
    storage.mend()
    storage.delete(NAMES[0])
    return storage.names() == []


def parts_come_back_end_to_end(storage: Storage) -> bool:
    """Chunks are joined, an empty part is a part, names are sorted."""
    storage.put(NAMES[1], ONE)
    storage.put(NAMES[0], TWO)
    found = storage.get(NAMES[1], "a.json"), storage.get(NAMES[1], "z.json")
    return found == (b"123", b"") and storage.names() == list(NAMES)


def chunks_are_the_callers(storage: Storage) -> bool:
    """The caller writes its memory over once ``put`` has returned."""
    memory = bytearray(b"before")
    storage.put(NAMES[0], {"a.json": [memoryview(memory)]})
    memory[:] = b"after!"
    return storage.get(NAMES[0], "a.json") == b"before"


def a_replacement_replaces_all(storage: Storage) -> bool:
    """No part of the earlier one is left."""
    storage.put(NAMES[0], {**ONE, "b.json": [b"b"]})
    storage.put(NAMES[0], TWO)
    found = storage.get(NAMES[0], "a.json"), storage.get(NAMES[0], "z.json")
    return found == (b"other", b"z") and not _has(storage, NAMES[0], "b.json")


def what_is_missing_is_an_error(storage: Storage) -> bool:
    """A checkpoint or a part that is not there is a ``CheckpointError``."""
    storage.put(NAMES[0], ONE)
    return not _has(storage, NAMES[1], "a.json") and not _has(storage, NAMES[0], "b.json")


def what_is_deleted_is_gone(storage: Storage) -> bool:
    """The others stay."""
    for name in NAMES:
        storage.put(name, ONE)
    storage.delete(NAMES[1])
    return storage.names() == [NAMES[0]] and not _has(storage, NAMES[1], "a.json")


def mending_leaves_what_is_whole(storage: Storage) -> bool:
    """``mend`` touches no checkpoint that was kept, nor one that was replaced."""
    storage.put(NAMES[0], ONE)
    storage.put(NAMES[0], TWO)
    storage.mend()
    return storage.names() == [NAMES[0]] and storage.get(NAMES[0], "a.json") == b"other"


def names_cannot_lead_elsewhere(storage: Storage) -> bool:
    """A name or a part that is no plain word is refused by every method."""
    asked: list[Callable[[str], object]] = [
        lambda bad: storage.put(bad, ONE),
        lambda bad: storage.put(NAMES[0], {bad: [b"x"]}),
        lambda bad: storage.get(bad, "a.json"),
        lambda bad: storage.get(NAMES[0], bad),
        lambda bad: storage.delete(bad),
    ]
    return all(_refuses(ask, bad) for ask in asked for bad in HOSTILE) and storage.names() == []


DEMANDS: dict[str, Callable[[Storage], bool]] = {
    demand.__name__: demand
    for demand in (
        an_empty_one_is_empty,
        parts_come_back_end_to_end,
        chunks_are_the_callers,
        a_replacement_replaces_all,
        what_is_missing_is_an_error,
        what_is_deleted_is_gone,
        mending_leaves_what_is_whole,
        names_cannot_lead_elsewhere,
    )
}


def _has(storage: Storage, name: str, part: str) -> bool:
    try:
        storage.get(name, part)
    except CheckpointError:
        return False
    return True


def _refuses(ask: Callable[[str], object], bad: str) -> bool:
    try:
        ask(bad)
    except StateError:
        return True
    return False
