"""Folders that appear and are replaced as a whole: at any instant the old one or the new one is there.

No call swaps two folders, so a replacement is three renames. Beside ``grown`` lie for that time

.grown.0f3a….draft   being written; its writer holds a lock on it, which ends with the writer
.grown.0f3a….ready   complete, about to get the name
.grown.0f3a….old     what had the name, about to go

A reader finds the last complete one with ``standing``; what a killed writer left, ``mend`` puts right.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

Chunks: TypeAlias = Sequence["bytes | memoryview"]  # of one file, end to end
_LEFT = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(draft|ready|old)", re.DOTALL)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # another writer was faster; the later one replaces it


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Make ``target`` the folder that ``write`` fills; what was there stays until the new one is complete.

    Raises:
        OSError: It cannot be written; ``target`` is as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with suppress(OSError):
        mend(target)
    try:
        with _draft(target) as draft:
            write(draft)
            sync(draft)
            _take_the_name(draft, target)
            sync(target.parent)
    finally:
        with suppress(OSError):  # what cannot go now goes with the next one
            mend(target)


def standing(target: Path) -> Path:
    """Return where the last complete folder is: ``target``, or what is to get, or had, its name."""
    if os.path.lexists(target):
        return target
    found = dict(_left(target))
    for kind in ("ready", "old"):
        if kind in found:
            return found[kind]
    return target


def mend(target: Path) -> None:
    """End what a killed writer began; where one is at work, leave everything to it.

    Raises:
        OSError: The folder above cannot be read or written.
    """
    found = sorted(_left(target), key=lambda one: one[0], reverse=True)  # ready, old, draft
    with ExitStack() as held:
        if not all(_locked(path, held) for _, path in found):
            return
        for kind, path in found:
            if kind != "draft" and not os.path.lexists(target):
                path.rename(target)
                sync(target.parent)
            else:
                shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, chunks: Chunks) -> None:
    """Write a new file and sync it."""
    with open(path, "xb", buffering=0) as file:
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            while rest:  # a disk that runs full writes a part of it first
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: BaseException) -> str:
    """Return what an error says; an ``OSError`` made by hand has no ``strerror``."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _left(target: Path) -> list[tuple[str, Path]]:
    """List what writers of ``target`` left, or are at, by kind."""
    try:
        beside = list(target.parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = ((_LEFT.fullmatch(path.name), path) for path in beside)
    return [(match[2], path) for match, path in matches if match and match[1] == target.name]


def _locked(path: Path, held: ExitStack) -> bool:
    """Tell whether no writer is at ``path``; it stays locked while ``held`` is open."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        return error.errno == errno.ENOENT  # gone meanwhile; what is no folder is not ours
    held.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno != errno.EWOULDBLOCK  # a file system without locks has no two writers
    return True


@contextmanager
def _draft(target: Path) -> Iterator[Path]:
    """Make a draft nobody else has or removes; what is left of it at the end goes."""
    with ExitStack() as held:
        while True:
            draft = target.with_name(f".{target.name}.{secrets.token_hex(8)}.draft")
            draft.mkdir()
            if _locked(draft, held) and draft.exists():  # or a mender saw it before it was locked
                break
        held.callback(shutil.rmtree, draft, ignore_errors=True)
        yield draft


def _take_the_name(draft: Path, target: Path) -> None:
    ready, old = draft.with_suffix(".ready"), draft.with_suffix(".old")
    draft.rename(ready)
    try:
        while True:
            with suppress(FileNotFoundError):
                target.rename(old)
            try:
                ready.rename(target)
                break
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                shutil.rmtree(old, ignore_errors=True)
    except BaseException:  # Ctrl-C between two renames too
        if ready.exists():  # or it has the name already
            if old.exists() and not target.exists():
                old.rename(target)
            ready.rename(draft)
        raise
    shutil.rmtree(old, ignore_errors=True)
