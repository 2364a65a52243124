"""Checkpoints in a store that knows single blobs only: a bucket, or a dictionary.

step-00000120/commit                          names the draft that is the checkpoint; written last, 17 bytes
step-00000120/0f3a…/genome.json …             a draft: a whole checkpoint, as it would lie in a folder
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from typing import Protocol

from esper.errors import CheckpointError, StoreError
from esper.storage.protocol import NAME, PART, Chunks, require

COMMIT = "commit"
_TOKEN = re.compile(rb"[0-9a-f]{16}\n")
_KEY = re.compile(rf"({NAME.pattern})/(?:{COMMIT}|([0-9a-f]{{16}})/{PART.pattern})")


class BlobStore(Protocol):
    """Keeps bytes under keys like ``a/b/c``, each all or nothing; every method raises ``StoreError``."""

    def put(self, key: str, content: Chunks) -> None:
        """Keep a blob; what was there is replaced."""

    def swap(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace ``old`` (None: nothing) by ``new``; returns False if something else is there."""

    def get(self, key: str) -> bytes | None:
        """Return a blob, or None."""

    def keys(self, prefix: str = "") -> list[str]:
        """List the keys that start with ``prefix``, sorted."""

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is no error."""


class BlobStorage:
    """Keeps checkpoints in any :class:`BlobStore`.

    The parts are written under a name nobody knows, then one blob that names it: writing that one is the
    commit. A kill before it leaves an orphan, never a half checkpoint, and what was there stays until then.

    Args:
        blobs: Store of objects; one run has it, or a prefix of it, for itself.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs

    def __str__(self) -> str:
        return str(self.blobs)

    def put(self, name: str, parts: Mapping[str, Chunks]) -> None:
        """Keep a checkpoint.

        Raises:
            CheckpointError: Another process wrote the same one meanwhile.
            StoreError: The store does not answer, or refuses; what was there is untouched.
        """
        require(name, NAME, "a checkpoint's name")
        commit, draft = f"{name}/{COMMIT}", secrets.token_hex(8)
        before = self.blobs.get(commit)
        try:
            for part, chunks in parts.items():
                self.blobs.put(f"{name}/{draft}/{require(part, PART, 'a part')}", chunks)
        except (CheckpointError, StoreError):
            self._drop(f"{name}/{draft}/")
            raise
        # Where this raises, the commit may have happened: the draft stays, and mend() knows.
        if not self.blobs.swap(commit, before, f"{draft}\n".encode()):
            self._drop(f"{name}/{draft}/")
            raise CheckpointError(
                f"cannot keep {name} in {self}: another process writes there; give each run its own place"
            )
        if before is not None:
            self._drop(f"{name}/", but=draft)

    def _drop(self, prefix: str, but: str = COMMIT) -> None:
        """Remove blobs that nobody reads; what cannot be removed now, mend() removes."""
        with suppress(StoreError):
            for key in self.blobs.keys(prefix):
                if key.split("/")[1] not in (COMMIT, but):
                    self.blobs.delete(key)

    def get(self, name: str, part: str) -> bytes:
        """Return one part.

        Raises:
            CheckpointError: There is no such checkpoint or part.
            StoreError: The store does not answer, or refuses.
        """
        require(name, NAME, "a checkpoint's name")
        require(part, PART, "a part")
        draft = self.blobs.get(f"{name}/{COMMIT}")
        if draft is None:
            raise CheckpointError(f"{self} has no {name}, so no {part} of it")
        if not _TOKEN.fullmatch(draft):
            raise CheckpointError(
                f"{name}: {COMMIT} is damaged: it is not 16 digits of 0-9a-f and a line's end"
            )
        content = self.blobs.get(f"{name}/{draft.decode().strip()}/{part}")
        if content is None:
            raise CheckpointError(f"{name} has no {part}")
        return content

    def names(self) -> list[str]:
        """List the checkpoints, sorted.

        Raises:
            StoreError: The store does not answer, or refuses.
        """
        found = (_KEY.fullmatch(key) for key in self.blobs.keys())  # noqa: SIM118 (no dictionary)
        return sorted(match[1] for match in found if match and match[2] is None)

    def delete(self, name: str) -> None:
        """Remove a checkpoint: its commit first, so that a kill leaves no half of it.

        Raises:
            StoreError: The store does not answer, or refuses.
        """
        require(name, NAME, "a checkpoint's name")
        self.blobs.delete(f"{name}/{COMMIT}")
        for key in self.blobs.keys(f"{name}/"):
            self.blobs.delete(key)

    def mend(self) -> None:
        """Remove the drafts that no commit names.

        Raises:
            StoreError: The store does not answer, or refuses.
        """
        drafts: dict[str, dict[str, list[str]]] = {}
        for key in self.blobs.keys():  # noqa: SIM118 (no dictionary)
            if (match := _KEY.fullmatch(key)) and match[2]:
                drafts.setdefault(match[1], {}).setdefault(match[2], []).append(key)
        for name, kept in drafts.items():
            commit = self.blobs.get(f"{name}/{COMMIT}")
            for draft, keys in kept.items():
                if commit is None or (_TOKEN.fullmatch(commit) and commit != f"{draft}\n".encode()):
                    for key in keys:
                        self.blobs.delete(key)
