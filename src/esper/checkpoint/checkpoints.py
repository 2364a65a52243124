"""``CheckpointManager``: snapshot → compress → persist → validate → load."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from esper.checkpoint.cadence import Cadence, Every
from esper.checkpoint.choosing import newest_of_all, require_none
from esper.checkpoint.contents.fitting import require_own_shapes, require_same_model, unkeepable
from esper.checkpoint.contents.rank_state import adapted, joined, own_part, to_bytes
from esper.checkpoint.contents.run import Run, capture_run, restore_run, versions
from esper.checkpoint.contents.run_shards import load_shards, save_shards
from esper.checkpoint.contents.snapshots import Snapshot, State, taken_of
from esper.checkpoint.format.manifest import Manifest, name_of, numbers
from esper.checkpoint.format.reader import Checkpoint, newest
from esper.checkpoint.format.run_state import RunState
from esper.checkpoint.keeping import Keeper
from esper.checkpoint.retention import Best, Retention
from esper.checkpoint.writer import Writer
from esper.contracts import Event, Observer, ignore
from esper.distributed.collectives import Peers
from esper.distributed.model_wrapper import Wrapping
from esper.errors import CheckpointError, ConfigError, FinishedError, StateError
from esper.storage.address import storage_at
from esper.storage.lease import Lease
from esper.storage.protocol import Storage
from esper.storage.replacing import reason
from esper.surgery.optimizers.clock import Clock
from esper.surgery.optimizers.inner import with_inner

ASKED = 8  # steps between questions to the first process whether a checkpoint is due
Judge = Callable[[Any], None]  # of the config in a checkpoint: raises to refuse it


class CheckpointManager:
    """Saves a run in the background, and brings a fresh run to where the newest sound checkpoint was.

    A snapshot is a copy made on the calling thread; one thread of its own writes, verifies and prunes. While
    one snapshot is written at most one more waits, and a newer one takes its place. Whatever goes wrong there
    (a full disk, a folder that became read-only) is told as an event and never ends training.

    A folder belongs to one manager until that is closed, or its process ends: a second one is refused.

    Gradients are not part of a checkpoint: it is taken right after an optimizer step, never between the
    micro-batches of one.

    Args:
        storage: A folder, a URL like ``s3://bucket/prefix``, or anything that keeps the ``Storage`` contract;
            one manager writes to it.
        run: Run to save.
        every: Optimizer steps, or a ``timedelta``, between checkpoints; None: from their measured cost,
            within 1.5 % of the run's time.
        keep: Number of the newest that are kept; None keeps all.
        best: A metric and its better direction, ``("loss", "min")``; the best checkpoint is kept besides.
        failure_every: Seconds between failures that ``every=None`` reckons with.
        milestones: Whether a checkpoint also comes within seconds of the beginning, and whenever the run has
            grown; None: only where ``every`` is None.
        observe: Called with every event, on the thread that calls the manager; None: as growth's events are.

    Attributes:
        cadence: When the next one is due, and ``told()``, what that costs and loses.
        run_id: Id of the run: random, or that of the checkpoint it went on from.
        stalls: Seconds training stood still, per snapshot, the last thousand.

    Raises:
        StateError: Another manager has the folder; the message says whose.
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
        milestones: bool | None = None,
        observe: Observer | None = None,
    ) -> None:
        self.storage: Storage = storage_at(storage)
        self.run = run
        self.observe = observe or (ignore if run.growth is None else run.growth.observe)
        self.wrapping = Wrapping(run.model) if run.growth is None else run.growth.wrapping
        self.peers: Peers = self.wrapping.peers
        weights = sum(p.nbytes for module in run.trained.values() for p in module.parameters())
        # Adam keeps two numbers per weight
        self.cadence = Cadence(every, failure_every, 3 * weights, milestones=milestones)
        self.journal = None if run.growth is None else run.growth.journal
        own = None if self.journal is None else self.journal.run
        self.keeper = Keeper(self.storage, Retention(keep, best), self.cadence, own or secrets.token_hex(8))
        self.writer = Writer()
        self.offered = 0  # the steps after which step() last asked
        self.stalls: deque[float] = deque(maxlen=1000)
        self.closed = self.resumed = self.asked = False
        self.lease = self._leased()
        self.taken = Clock(with_inner(run.named) or run.named)
        self.messages.extend(unkeepable(run))

    def _leased(self) -> Lease | None:
        """Take the folder, and end there what a killed writer began; None where nothing is to be taken."""
        if self.peers.rank:
            return None
        take = getattr(self.storage, "lease", None)  # places without one know a second writer by his commits
        lease = None
        try:
            lease = None if take is None else take()
        except OSError as error:
            self.messages.append(
                f"{self.storage} cannot be locked: {reason(error)}; a second run that kept its checkpoints "
                "there would not be noticed, and would delete this one's"
            )
        try:
            self.storage.mend()
        except StateError as error:
            self.messages.append(f"the checkpoints could not be mended: {error}")
        return lease

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.taken.settled()

    @property
    def written(self) -> int:
        """Checkpoints kept and verified."""
        return self.keeper.written

    @property
    def failures(self) -> int:
        """Checkpoints that could not be."""
        return self.keeper.failures

    @property
    def last(self) -> str | None:
        """Name of the newest checkpoint that this process has written, once it is; None before the first."""
        return self.keeper.last

    @property
    def messages(self) -> deque[str]:
        """What is still to be told."""
        return self.keeper.messages

    @property
    def run_id(self) -> str:
        """Tell one run's checkpoints from another's."""
        return self.keeper.run

    # -- saving ----------------------------------------------------------------------------------------------

    def step(self, metrics: Mapping[str, object] | None = None) -> bool:
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
                self._require_own()
        self.offered = self.steps
        return self._due() and self.save_or_tell(metrics)

    def save_or_tell(self, metrics: Mapping[str, object] | None = None, *, wait: bool = False) -> bool:
        """Save as ``step`` does where a checkpoint is due: what goes wrong is told, and training goes on.

        Args:
            metrics: As for ``save``.
            wait: As for ``save``; without it a newer snapshot may take the place of this one.

        Returns:
            Whether a snapshot was taken.

        Raises:
            ConfigError: As ``step``.
        """
        try:
            self.save(metrics, wait=wait)
        except ConfigError:
            raise
        except Exception as error:  # a state_dict() of the user's may raise anything
            self.keeper.failed(name_of(self.steps), error)
            self.cadence.saved(self.steps)
            self._tell()
            return False
        return True

    def _due(self) -> bool:
        """Ask the cadence; where it reads a clock, the first process's counts, and is asked now and then."""
        growth = self.run.growth
        if self.cadence.grown(0 if growth is None else len(growth.plans)):
            return True
        if self.peers.world == 1 or (isinstance(self.cadence.every, int) and not self.cadence.milestones):
            return self.cadence.due(self.steps)
        return self.steps % ASKED == 0 and bool(
            self.peers.broadcast_floats([self.cadence.due(self.steps)])[0]
        )

    def save(self, metrics: Mapping[str, object] | None = None, *, wait: bool = False) -> str:
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
            self._require_own()
        snapshot = self._snapshot(metrics or {})
        self.stalls.append(snapshot.stall)
        self.cadence.saved(self.steps)
        if self.peers.rank == 0:
            self.writer.submit(lambda: self.keeper.write(snapshot))
        if wait:
            self.writer.flush()
        self._tell()
        return snapshot.manifest.name

    def save_last(self, metrics: Mapping[str, object] | None = None) -> str | None:
        """Save once more and wait for it, at the end of a run or before its process ends.

        Alone, a process tries twice. What goes wrong is told, and the checkpoints before stay.

        Returns:
            The checkpoint's name; None where it could not be written.
        """
        for _ in range(2 if self.peers.world == 1 else 1):
            before = self.failures
            try:
                name = self.save(metrics, wait=True)
            except ConfigError:
                raise
            except Exception as error:  # as in step()
                self.keeper.failed(name_of(self.steps), error)
            else:
                if self.failures == before:
                    return name
        self._tell()
        return None

    def _require_own(self) -> None:
        """Keep a fresh run from deleting an older one's checkpoints; asked before the first is saved."""
        require_none(self.storage, self.peers)
        self.resumed = True

    def _snapshot(self, metrics: Mapping[str, object]) -> Snapshot:
        spare: Mapping[str, Tensor] = self.keeper.spare
        self.keeper.spare = {}
        known, unknown = numbers(metrics)
        self.messages.extend(unknown)
        return taken_of(self.run, self.steps, known, self.run_id, spare, self._state)

    def _state(self) -> State:
        """Return the run's state, with every process's own part on the first one, and the shards it lists."""
        state = capture_run(self.run, self.steps)
        if self.peers.world == 1:
            return state, []
        own, failure = b"", None
        try:
            own = to_bytes(own_part(state))
        except StateError as error:
            failure = error
        parts = self.peers.gather_bytes(own)  # the others wait for it, whatever happened here
        if failure is not None:
            raise failure
        self.writer.flush()  # nothing is being written while shards are counted
        left, shards = save_shards(self.wrapping, self.storage, name_of(self.steps), state)
        return {} if self.peers.rank else joined(left, parts), shards

    def _tell(self) -> None:
        while self.keeper.kept:
            self.observe(Event("checkpoint", self.steps, self.keeper.kept.popleft()))
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
        found = newest(self.storage, self.messages.append, self._check)
        self._tell()
        return found

    def resume(self, judge: Judge | None = None) -> Manifest | None:
        """Bring the run, which must be fresh, to the newest sound checkpoint; None where there is none.

        Args:
            judge: Called with the checkpoint's ``config`` before anything is changed; what it raises is
                raised. None: differences are told.

        Raises:
            StateError: The checkpoint is of another run.
        """
        self.resumed = True
        if self.peers.world == 1:
            found = self.latest()
        else:
            found = newest_of_all(self.storage, self.peers, self.messages.append, self._check)
        return None if found is None else self._restore(found, judge)

    def _check(self, checkpoint: Checkpoint) -> None:
        require_own_shapes(self.run, checkpoint.genome, checkpoint.state, checkpoint.manifest.name)

    def restore(self, checkpoint: Checkpoint) -> Manifest:
        """Bring the run, which must be fresh, to a checkpoint; those of later steps are deleted.

        Topology comes first, then models and optimizers by name, random streams and the data's position last.

        Raises:
            StateError: The checkpoint is of another run; the run is not usable then.
        """
        self.writer.flush()
        self.resumed = True
        self._check(checkpoint)
        manifest = self._restore(checkpoint)
        if self.peers.rank == 0:
            self.keeper.give_up(manifest.step)
        self._tell()
        return manifest

    def _restore(self, checkpoint: Checkpoint, judge: Judge | None = None) -> Manifest:
        manifest = checkpoint.manifest
        require_same_model(self.run, checkpoint.genome, manifest.name)
        if judge is not None:
            judge(checkpoint.state["config"])
        batches, peers = self.run.batches, self.peers
        length = None if batches is None else batches.length
        state, different = adapted(checkpoint.state, peers.rank, peers.world, length)
        self._adopt(manifest)
        different += restore_run(self.run, state, self._bring, told=judge is None)
        now = versions()
        different += [f"{k} was {v} and is {now.get(k)}" for k, v in manifest.code.items() if now.get(k) != v]
        self.taken.count = self.offered = checkpoint.state["steps"]
        self.cadence.last_step = self.steps
        self.cadence.grown(0 if self.run.growth is None else len(self.run.growth.plans))
        if different:
            self.messages.append(f"the run goes on from {manifest.name}, but {'; '.join(different)}")
        self.observe(Event("resumed", self.steps, {"step": self.steps, "name": manifest.name}))
        self._tell()
        return manifest

    def _adopt(self, manifest: Manifest) -> None:
        """Be the run whose checkpoint this is; one of before there were ids keeps having none."""
        self.keeper.adopted = manifest.summary.get("run")
        self.keeper.run = self.keeper.adopted or self.keeper.run
        if self.journal is not None and self.journal.run is not None:
            self.journal.run = self.keeper.run

    def _bring(self, state: RunState) -> RunState:
        return load_shards(self.wrapping, self.storage, state, self.run.named)

    def close(self) -> None:
        """Wait for the last checkpoint to be written; the manager saves no more."""
        self.closed = True
        self.taken.close()
        self.writer.flush()
        self._tell()
        if self.lease is not None:
            self.lease.release()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
