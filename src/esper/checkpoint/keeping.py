"""What becomes of a snapshot: it is persisted, verified, and old ones go; on the writer's thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping

from torch import Tensor

from esper.checkpoint.cadence import Cadence
from esper.checkpoint.contents.snapshots import Snapshot
from esper.checkpoint.format.manifest import Manifest, parts_of, read_manifest, step_of
from esper.checkpoint.format.reader import sound, sound_among, steps_kept
from esper.checkpoint.retention import Retention
from esper.errors import CheckpointError, StateError
from esper.storage.protocol import Storage
from esper.storage.replacing import reason


class Keeper:
    """Keeps snapshots, and tells what came of it; nothing that goes wrong here ends training.

    Args:
        storage: Storage that is written to.
        retention: Rule that says which checkpoints stay.
        cadence: Cadence, told what each checkpoint cost.
        run: Id of the run; checkpoints of another one are never deleted.

    Attributes:
        written: Checkpoints kept and verified.
        failures: Checkpoints that could not be.
        last: The newest of ``written``, None before the first.
        messages: Sentences for people, from whichever thread; told on the training's.
        kept: Facts of checkpoints written, likewise.
        spare: Tensors of a snapshot that was written; the next one writes them over.
    """

    def __init__(self, storage: Storage, retention: Retention, cadence: Cadence, run: str) -> None:
        self.storage, self.retention, self.cadence, self.run = storage, retention, cadence, run
        self.sound: dict[str, Manifest] = {}  # verified by this process
        self.written = self.failures = 0
        self.last: str | None = None
        self.messages: deque[str] = deque()
        self.kept: deque[dict[str, object]] = deque()
        self.spare: Mapping[str, Tensor] = {}
        self.adopted: str | None = run  # id in the checkpoint this run goes on from; None: it has none

    def write(self, snapshot: Snapshot) -> None:
        """Persist, verify, prune."""
        begun, name = time.thread_time(), snapshot.manifest.name
        self.sound.pop(name, None)
        try:
            parts = parts_of(snapshot.manifest, snapshot.genome, snapshot.skeleton, snapshot.tensors)
            self.storage.put(name, parts)
            found = sound(self.storage, name)
        except Exception as error:  # a store of the user's may raise anything
            self.failed(name, error)
        else:
            self.written, self.last = self.written + 1, name
            self.sound[name] = found
            facts = {"name": name, "step": found.step, "bytes": found.size, "seconds": snapshot.stall}
            self.kept.append({**facts, "run": self.run})
            self.give_up(snapshot.manifest.step)
            self.prune()
        self.spare = snapshot.tensors
        self.cadence.measured(snapshot.stall + time.thread_time() - begun)

    def failed(self, name: str, error: BaseException) -> None:
        """Count a checkpoint that was not written, and say why."""
        self.failures += 1
        why = reason(error) if isinstance(error, StateError | OSError) else f"{type(error).__name__}: {error}"
        self.messages.append(f"the checkpoint {name} was not written, training goes on: {why}")

    def give_up(self, step: int) -> None:
        """Delete the run's checkpoints of later steps: it went back, and goes another way from here."""
        try:
            for name in steps_kept(self.storage):
                if (step_of(name) or 0) <= step:
                    continue
                if not self._ours(name):
                    self.messages.append(f"{name} is of a later step and of another run; it was left alone")
                    continue
                self.storage.delete(name)
                self.sound.pop(name, None)
                self.messages.append(f"{name} was deleted: the run goes on from an earlier step")
        except Exception as error:  # as above
            self.messages.append(f"later checkpoints were not deleted: {reason(error)}")

    def prune(self) -> None:
        """Delete what need not stay."""
        if self.retention.keep is None:
            return
        try:
            names = steps_kept(self.storage)
            # those of an earlier process are verified once
            self.sound |= sound_among(self.storage, [name for name in names if name not in self.sound])
            known = {name: manifest for name, manifest in self.sound.items() if name in names}
            own = [name for name in names if self._ours(name)]
            for name in self.retention.superfluous(own, {n: m for n, m in known.items() if n in own}):
                self.storage.delete(name)
                self.sound.pop(name, None)
        except Exception as error:  # as above
            self.messages.append(f"old checkpoints were not deleted: {reason(error)}")

    def _ours(self, name: str) -> bool:
        """Tell whether a checkpoint is this run's; a damaged one, which cannot say, is."""
        try:
            manifest = self.sound.get(name) or read_manifest(self.storage, name)
        except CheckpointError:
            return True
        except StateError:  # of a version to come
            return False
        return manifest.summary.get("run") in (self.run, self.adopted)
