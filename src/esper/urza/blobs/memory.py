"""Bytes in this process: for tests, and for trying what a bucket would do."""

from __future__ import annotations

import threading
from collections.abc import Sequence

__all__ = ["MemoryStore"]


class MemoryStore:
    """Keeps blobs in a dictionary."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.lock = threading.Lock()

    @classmethod
    def at(cls, place: str) -> MemoryStore:
        """Make an empty one; ``place``, the URL behind ``memory://``, names nothing that lasts."""
        return cls()

    def put(self, key: str, content: Sequence[bytes | memoryview]) -> None:
        """Keep a blob; what was there is replaced."""
        whole = b"".join(content)
        with self.lock:
            self.kept[key] = whole

    def swap(self, key: str, old: bytes | None, new: bytes) -> bool:
        """Replace ``old`` (None: nothing) by ``new``; returns False if something else is there."""
        with self.lock:
            same = self.kept.get(key) == old
            if same:
                self.kept[key] = new
            return same

    def get(self, key: str) -> bytes | None:
        """Return a blob, or None."""
        with self.lock:
            return self.kept.get(key)

    def keys(self, prefix: str = "") -> list[str]:
        """List the keys that start with ``prefix``, sorted."""
        with self.lock:
            return sorted(key for key in self.kept if key.startswith(prefix))

    def delete(self, key: str) -> None:
        """Remove a blob; one that is not there is no error."""
        with self.lock:
            self.kept.pop(key, None)
