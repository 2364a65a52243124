"""``CheckpointManager``: snapshot → compress → persist → validate → load."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from esper.contracts import Event, Observer, ignore
from esper.errors import CheckpointError, ConfigError, FinishedError, StateError
from esper.kasmina.peers import Peers
from esper.tolaria.checkpoint.cadence import Cadence, Every
from esper.tolaria.checkpoint.format import Manifest, finite, name_of, packed, parts_of, step_of
from esper.tolaria.checkpoint.loading import Checkpoint, newest, read, sound, sound_among, steps_kept
from esper.tolaria.checkpoint.places import storage_at
from esper.tolaria.checkpoint.processes import adapted, joined, own_part, to_bytes
from esper.tolaria.checkpoint.retention import Best, Retention
from esper.tolaria.checkpoint.run import Run, capture_run, genome_of, restore_run, summary_of, versions
from esper.tolaria.checkpoint.storage import Storage
from esper.tolaria.checkpoint.writer import Writer
from esper.tolaria.distributed.wrapping import SHARDS, Wrapping
from esper.tolaria.surgery.clock import Clock
from esper.tolaria.surgery.inner import with_inner

ASKED = 8  # steps between questions to the first process whether a checkpoint is due
NONE, UNKNOWN = -1, -2  # no step
VERDICTS = ("sound", "damaged", "refused")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run's state, copied."""

    manifest: Manifest
    genome: bytes
    skeleton: Any
    tensors: Mapping[str, Tensor]
    stall: float  # seconds training stood still for it


class CheckpointManager:
    """Saves a run in the background, and brings a fresh run to where the newest sound checkpoint was.

    A snapshot is a copy made on the calling thread; one thread of its own writes, verifies and prunes. While
    one snapshot is written at most one more waits, and a newer one takes its place. Whatever goes wrong there
    (a full disk, a folder that became read-only) is told as an event and never ends training.

    Gradients are not part of a checkpoint: it is taken right after an optimizer step, never between the
    micro-batches of one.

    Args:
        storage: A folder, a URL like ``s3://bucket/prefix``, or anything that keeps the ``Storage`` contract;
            one manager writes to it.
        run: What to save.
        every: Optimizer steps, or a ``timedelta``, between checkpoints; None: from their measured cost,
            within 1.5 % of the run's time.
        keep: How many of the newest are kept; None keeps all.
        best: A metric and its better direction, ``("loss", "min")``; the best checkpoint is kept besides.
        failure_every: Seconds between failures that ``every=None`` reckons with.
        observe: Called with every event, on the thread that calls the manager; None: as growth's events are.

    Attributes:
        cadence: When the next one is due, and ``told()``, what that costs and loses.
        written: Checkpoints kept and verified.
        failures: Checkpoints that could not be.
        stalls: Seconds training stood still, per snapshot, the last thousand.
    """

    def __init__(
        self,
        storage: Storage | str | Path,
        run: Run,
        *,
        every: Every = None,
        keep: int | None = 3,
        best: Best | None = None,
        failure_every: float = 3600.0,
        observe: Observer | None = None,
    ) -> None:
        self.storage: Storage = storage_at(storage)
        self.run = run
        self.observe = observe or (ignore if run.growth is None else run.growth.parts.observe)
        self.wrapping = Wrapping(run.model) if run.growth is None else run.growth.parts.wrapping
        self.peers: Peers = self.wrapping.peers
        self.retention = Retention(keep, best)
        weights = sum(p.nbytes for module in run.trained.values() for p in module.parameters())
        self.cadence = Cadence(every, failure_every, 3 * weights)  # Adam keeps two numbers per weight
        self.writer = Writer()
        self.spare: Mapping[str, Tensor] = {}  # of a snapshot that was written; the next one writes it over
        self.sound: dict[str, Manifest] = {}  # verified by this process; the writer's own
        self.written = self.failures = 0
        self.offered = 0  # the steps after which step() last asked
        self.stalls: deque[float] = deque(maxlen=1000)
        self.messages: deque[str] = deque()  # from the writer, told on the caller's thread
        self.kept: deque[dict[str, Any]] = deque()  # likewise, of checkpoints verified
        self.closed = self.resumed = self.asked = False
        self.taken = Clock(with_inner(run.named) or run.named)
        try:
            if self.peers.rank == 0:
                self.storage.mend()
        except StateError as error:
            self.messages.append(f"the checkpoints could not be mended: {error}")

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.taken.settled()

    # -- saving ----------------------------------------------------------------------------------------------

    def step(self, metrics: Mapping[str, Any] | None = None) -> bool:
        """Call once per batch, last; saves where a checkpoint is due and an optimizer step has happened.

        Returns:
            Whether a snapshot was taken.

        Raises:
            ConfigError: The storage holds the checkpoints of a run that this one was not resumed from.
        """
        self._tell()
        if self.taken.settled() == self.offered:
            return False
        if not self.resumed and not self.asked:
            self.asked = True
            with suppress(CheckpointError):  # save() asks again, and is told
                self._refuse_strangers()
        self.offered = self.steps
        if not self._due():
            return False
        try:
            self.save(metrics)
        except StateError as error:
            self._failed(name_of(self.steps), error)
            self.cadence.saved(self.steps)
            self._tell()
            return False
        return True

    def _due(self) -> bool:
        """Ask the cadence; where it reads a clock, the first process's counts, and is asked now and then."""
        if self.peers.world == 1 or isinstance(self.cadence.every, int):
            return self.cadence.due(self.steps)
        return self.steps % ASKED == 0 and bool(self.peers.agree([self.cadence.due(self.steps)])[0])

    def save(self, metrics: Mapping[str, Any] | None = None, *, wait: bool = False) -> str:
        """Take a snapshot now and have it written.

        Args:
            metrics: Numbers for tables and for ``best``.
            wait: Return when it was written, or could not be.

        Returns:
            The checkpoint's name; where it can be written, it will be there.

        Raises:
            StateError: The run holds something that no checkpoint can; the message names it.
            FinishedError: The manager is closed.
        """
        if self.closed:
            raise FinishedError("save() after close(): make a new CheckpointManager")
        if not self.resumed:
            self._refuse_strangers()
        snapshot = self._snapshot(metrics or {})
        self.stalls.append(snapshot.stall)
        self.cadence.saved(self.steps)
        if self.peers.rank == 0:
            self.writer.submit(lambda: self._write(snapshot))
        if wait:
            self.writer.flush()
        self._tell()
        return snapshot.manifest.name

    def _refuse_strangers(self) -> None:
        """Keep a fresh run from deleting an older one's checkpoints; asked before the first is saved."""
        newest = NONE
        if self.peers.rank == 0:
            try:
                known = steps_kept(self.storage)
                newest = step_of(known[-1]) or 0 if known else NONE
            except StateError:
                newest = UNKNOWN
        (latest,) = self.peers.agree([newest])
        if latest == UNKNOWN:
            raise CheckpointError(
                "the storage cannot be listed: whether it holds the checkpoints of another run, nobody knows"
            )
        if latest != NONE:
            raise ConfigError(
                f"the storage holds {name_of(int(latest))} of another run; call resume() to go on "
                "from it, or give another folder"
            )
        self.resumed = True

    def _snapshot(self, metrics: Mapping[str, Any]) -> Snapshot:
        begun = time.perf_counter()
        spare = self.spare
        self.spare = {}
        with torch.no_grad():
            state, shards = self._state()
            skeleton, tensors = packed(state, spare)
        summary = {**summary_of(self.run), **({SHARDS: shards} if shards else {})}
        manifest = Manifest(self.steps, time.time(), versions(), finite(metrics), summary)
        return Snapshot(manifest, genome_of(self.run), skeleton, tensors, time.perf_counter() - begun)

    def _state(self) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
        """Return the run's state, with every process's own part on the first one, and the shards it lists."""
        state = capture_run(self.run, self.steps)
        if self.peers.world == 1:
            return state, []
        own, failure = b"", None
        try:
            own = to_bytes(own_part(state))
        except StateError as error:
            failure = error
        parts = self.peers.collect(own)  # the others wait for it, whatever happened here
        if failure is not None:
            raise failure
        self.writer.flush()  # nothing is being written while shards are counted
        left, shards = self.wrapping.stow(self.storage, name_of(self.steps), state)
        return (joined(left, parts), shards) if self.peers.rank == 0 else ({}, [])

    def _write(self, snapshot: Snapshot) -> None:
        """Persist, validate, prune; on the writer's thread."""
        begun, name = time.thread_time(), snapshot.manifest.name
        self.sound.pop(name, None)
        try:
            parts = parts_of(snapshot.manifest, snapshot.genome, snapshot.skeleton, snapshot.tensors)
            self.storage.put(name, parts)
            found = sound(self.storage, name)
        except (StateError, OSError, MemoryError) as error:
            self._failed(name, error)
        else:
            self.written += 1
            self.sound[name] = found
            size = sum(facts["size"] for facts in found.parts.values())
            self.kept.append({"name": name, "step": found.step, "bytes": size, "seconds": snapshot.stall})
            self._give_up(snapshot.manifest.step)
            self._prune()
        self.spare = snapshot.tensors
        self.cadence.measured(snapshot.stall + time.thread_time() - begun)

    def _failed(self, name: str, error: BaseException) -> None:
        self.failures += 1
        self.messages.append(f"the checkpoint {name} was not written, training goes on: {error}")

    def _give_up(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run went back, and goes another way from here."""
        try:
            for name in steps_kept(self.storage):
                if (step_of(name) or 0) > step:
                    self.storage.delete(name)
                    self.sound.pop(name, None)
                    self.messages.append(f"{name} was deleted: the run goes on from an earlier step")
        except StateError as error:
            self.messages.append(f"later checkpoints were not deleted: {error}")

    def _prune(self) -> None:
        if self.retention.keep is None:
            return
        try:
            names = steps_kept(self.storage)
            # those of an earlier process are verified once
            self.sound |= sound_among(self.storage, [name for name in names if name not in self.sound])
            known = {name: manifest for name, manifest in self.sound.items() if name in names}
            for name in self.retention.superfluous(names, known):
                self.storage.delete(name)
                self.sound.pop(name, None)
        except StateError as error:
            self.messages.append(f"old checkpoints were not deleted: {error}")

    def _tell(self) -> None:
        while self.kept:
            self.observe(Event("checkpoint", self.steps, self.kept.popleft()))
        while self.messages:
            self.observe(Event("warning", self.steps, {"message": self.messages.popleft()}))

    # -- loading ---------------------------------------------------------------------------------------------

    def latest(self) -> Checkpoint | None:
        """Return the newest checkpoint that verifies, read; None where there is none.

        Damaged ones are passed over, and an event says which and why.

        Raises:
            StateError: The storage cannot be listed.
        """
        self.writer.flush()
        found = newest(self.storage, self.messages.append)
        self._tell()
        return found

    def resume(self) -> Manifest | None:
        """Bring the run, which must be fresh, to the newest sound checkpoint; None where there is none.

        Raises:
            StateError: The checkpoint is of another run; the run is not usable then.
        """
        self.resumed = True
        found = self.latest() if self.peers.world == 1 else self._same_latest()
        return None if found is None else self._restore(found)

    def _same_latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that every process finds sound, stepping back together."""
        names = steps_kept(self.storage) if self.peers.rank == 0 else []
        for name in reversed(json.loads(self.peers.hear(json.dumps(names).encode()))):
            found: Checkpoint | None = None
            failure: StateError | None = None
            try:
                found = read(self.storage, name)
            except StateError as error:
                failure = error
            verdicts = [VERDICTS[v] for (v,) in self.peers.exchange([VERDICTS.index(verdict_on(failure))])]
            if len(set(verdicts)) > 1:  # who stepped back would delete what the others find sound
                raise StateError(
                    f"to the processes, in the order of ranks, {name} is {', '.join(verdicts)}; do all of "
                    f"them see the same storage?{'' if failure is None else f' {failure}'}"
                )
            try:
                if found is None:
                    raise failure or CheckpointError(f"{name} holds nothing")
                self.wrapping.verify(self.storage, found.manifest)
            except CheckpointError as error:
                self.messages.append(f"a damaged checkpoint was passed over: {error}")
                continue
            return found
        return None

    def restore(self, checkpoint: Checkpoint) -> Manifest:
        """Bring the run, which must be fresh, to a checkpoint; those of later steps are deleted.

        Topology comes first, then models and optimizers by name, random streams and the data's position last.

        Raises:
            StateError: The checkpoint is of another run; the run is not usable then.
        """
        self.writer.flush()
        self.resumed = True
        manifest = self._restore(checkpoint)
        if self.peers.rank == 0:
            self._give_up(manifest.step)
        self._tell()
        return manifest

    def _restore(self, checkpoint: Checkpoint) -> Manifest:
        manifest = checkpoint.manifest
        batches, peers = self.run.batches, self.peers
        length = None if batches is None else batches.length
        state, different = adapted(checkpoint.state, peers.rank, peers.world, length)
        different += restore_run(self.run, state, self._bring)
        now = versions()
        different += [f"{k} was {v} and is {now.get(k)}" for k, v in manifest.code.items() if now.get(k) != v]
        self.taken.count = self.offered = checkpoint.state["steps"]
        self.cadence.saved(self.steps)
        if different:
            self.messages.append(f"the run goes on from {manifest.name}, but {'; '.join(different)}")
        self.observe(Event("resumed", self.steps, {"step": self.steps, "name": manifest.name}))
        self._tell()
        return manifest

    def _bring(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.wrapping.bring(self.storage, state, self.run.named)

    def close(self) -> None:
        """Wait for the last checkpoint to be written; the manager saves no more."""
        self.closed = True
        self.taken.close()
        self.writer.flush()
        self._tell()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def verdict_on(failure: StateError | None) -> str:
    """Say what became of reading a checkpoint."""
    if failure is None:
        return "sound"
    return "damaged" if isinstance(failure, CheckpointError) else "refused"
