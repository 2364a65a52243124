"""A folder of checkpoints, each a folder of its own: ``step-00000123/``."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from esper.errors import CheckpointError, RunError, StateError
from esper.storage.lease import Lease
from esper.storage.protocol import NAME, PART, Chunks, require
from esper.storage.replacing import reason, sync, write_file

_DRAFT = re.compile(r"\.([a-z0-9-]+)\.[0-9a-f]{16}\.(draft|ready|old)")


class FolderStorage:
    """Keeps checkpoints in a folder; survives kill -9 and power cuts at any instant.

    A checkpoint is written into a hidden folder, every file is synced, then the folder; only then it gets its
    name, and the folder above is synced. A hidden one is nobody's checkpoint.

    Args:
        folder: Path, created with the first checkpoint; it stays the same folder wherever the process goes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.given, self.folder = folder, Path(os.path.abspath(folder))

    def __str__(self) -> str:
        return str(self.given)

    def put(self, name: str, parts: Mapping[str, Chunks]) -> None:
        """Keep a checkpoint.

        Raises:
            CheckpointError: The folder cannot be written; what was there is untouched.
        """
        require(name, NAME, "a checkpoint's name")
        draft = self.folder / f".{name}.{secrets.token_hex(8)}.draft"
        try:
            self._make_folder()
            draft.mkdir()
            for part, chunks in parts.items():
                write_file(draft / require(part, PART, "a part's name"), chunks)
            sync(draft)
            self._publish(draft, self.folder / name)
        except OSError as error:
            raise _refusal(f"cannot keep {name} in {self.folder}", error) from None
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def lease(self) -> Lease:
        """Take the folder for one writer, until it is released or its process ends.

        Raises:
            StateError: Another one has it; the message says who.
            OSError: It cannot be locked.
        """
        try:
            return Lease(self.folder, "another folder")
        except (RunError, ValueError) as error:  # ValueError: a path with a NUL in it
            raise StateError(f"{str(self)!r}: {error}" if "null" in str(error) else str(error)) from None

    def _make_folder(self) -> None:
        """Create the folder, and make its own name durable: what lies in it would be lost with it."""
        new = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            sync(path.parent)

    def _publish(self, draft: Path, target: Path) -> None:
        if not target.exists():
            draft.rename(target)
            sync(self.folder)
            return
        # No call swaps two folders. Killed between the two renames, mend() ends what was begun.
        ready, old = draft.with_suffix(".ready"), draft.with_suffix(".old")
        draft.rename(ready)
        try:
            target.rename(old)
            ready.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            ready.rename(draft)
            raise
        sync(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def get(self, name: str, part: str) -> bytes:
        """Return one part; no link is followed below the folder.

        Raises:
            CheckpointError: There is no such checkpoint or part, or it is not a readable file.
        """
        path = self.folder / require(name, NAME, "a checkpoint's name") / require(part, PART, "a part")
        try:
            if path.parent.is_symlink():
                raise CheckpointError(f"{path.parent} is a link; a checkpoint is a folder of its own")
            # O_NONBLOCK: a pipe in a file's place never answers.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            with os.fdopen(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise CheckpointError(f"{path} is not a file")
                return file.read()
        except OSError as error:
            raise _refusal(f"cannot read {path}", error) from None

    def size(self, name: str, part: str) -> int:
        """Return the bytes of one part, none of which are read: a file of holes may have more than memory.

        Raises:
            CheckpointError: There is no such checkpoint or part.
        """
        path = self.folder / require(name, NAME, "a checkpoint's name") / require(part, PART, "a part")
        try:
            return os.lstat(path).st_size
        except OSError as error:
            raise _refusal(f"cannot read {path}", error) from None

    def names(self) -> list[str]:
        """List the checkpoints, sorted.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        try:
            return sorted(p.name for p in self.folder.iterdir() if NAME.fullmatch(p.name) and p.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise _refusal(f"cannot list {self.folder}", error) from None

    def delete(self, name: str) -> None:
        """Remove a checkpoint: it loses its name first, so that a kill leaves no half of it.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        path = self.folder / require(name, NAME, "a checkpoint's name")
        hidden = self.folder / f".{name}.{secrets.token_hex(8)}.draft"
        try:
            path.rename(hidden)
            sync(self.folder)
            shutil.rmtree(hidden)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _refusal(f"cannot delete {path}", error) from None

    def mend(self) -> None:
        """Give a finished replacement its name, and remove drafts.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        try:
            left = sorted(self.folder.iterdir(), reverse=True) if self.folder.is_dir() else []
            found = [(path, match) for path in left if (match := _DRAFT.fullmatch(path.name))]
            for path, match in sorted(found, key=lambda one: one[1][2] != "ready"):
                target = self.folder / match[1]
                if match[2] != "draft" and not target.exists():
                    path.rename(target)
                else:
                    shutil.rmtree(path)
            if found:
                sync(self.folder)
        except OSError as error:
            raise _refusal(f"cannot mend {self.folder}", error) from None


def _refusal(what: str, error: OSError) -> CheckpointError:
    if error.errno == errno.ELOOP:
        return CheckpointError(f"{what}: it is a link; a checkpoint holds files of its own")
    return CheckpointError(f"{what}: {reason(error)}")
