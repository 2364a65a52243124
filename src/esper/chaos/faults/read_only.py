"""``read_only``: the folder of the checkpoints can be read and nothing else, for root too."""

from __future__ import annotations

import errno
from pathlib import Path

from esper.chaos import disk
from esper.chaos.child import Child
from esper.chaos.fault import Fault, Seen, Verdict
from esper.chaos.faults.full_disk import failing, kept_again, over
from esper.checkpoint import Storage

__all__ = ["ReadOnly"]


class ReadOnly(Fault):
    """Mounts the folder over itself read-only, for two checkpoints' time."""

    about = "the checkpoints' folder is read-only for a while"
    mounts = True

    def storage(self, child: Child, storage: Storage) -> Storage:
        """Refuse to write while it is; only where nothing can be mounted."""
        if child.spec.namespace is not None:
            return storage
        return failing(child, storage, errno.EROFS, "EROFS injected into the storage")

    def arm(self, child: Child) -> None:
        """Make it read-only, and writable again later."""
        folder = Path(child.spec.run_dir) / "checkpoints"
        if child.spec.namespace is None:
            return

        def freeze() -> None:
            folder.mkdir(exist_ok=True)
            child.strike("the folder is read-only (a mount, real EROFS)")
            disk.freeze(folder)

        child.once(child.spec.at, freeze)
        child.once(over(child), lambda: disk.thaw(folder))

    def judge(self, seen: Seen) -> Verdict:
        """Judge by whether checkpoints were kept again."""
        return kept_again(seen)
