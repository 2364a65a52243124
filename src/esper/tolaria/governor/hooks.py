"""Ties a governor to a run that grows: who reads, who is told, what goes back.

Growth goes forward when the host goes back. A rollback ends the seed that is awake (ROLLED_BACK, then
CULLED); what Tamiyo has learned, the gate's looks and the cost stay spent: restored, the same decision would
come again. Snapshots are taken only while no seed is exposed, the last one right before an exposure, so the
way back leads to a host that never felt the seed; a commit clears the ring and begins it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NotRequired, Protocol, TypedDict

import torch
from torch import nn
from torch.optim import Optimizer

from esper.checkpoint.contents.run import Stateful
from esper.contracts import Stage
from esper.errors import LossError
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.race.trial import Exposed
from esper.kasmina.seeds.state import AWAKE
from esper.nissa.detectors import Finding, Vitals
from esper.tamiyo.controller import Tamiyo
from esper.tolaria.governor.governor import Action, Actions, Governor, GovernorState, Settings
from esper.tolaria.governor.rollback import LAG, Capture, Snapshots, SnapshotState
from esper.tolaria.governor.seed_check import SILENT, Examiner, ExaminerState
from esper.tolaria.governor.vitals import ReaderState, Reading, VitalsReader, norms, total

EXCUSED = 2.5  # e-folds a graft may lift the loss by; a judged one lowers it


class Clearable(Protocol):
    """A container that can be emptied."""

    def clear(self) -> None:
        """Empty it."""


class Optimized(Protocol):
    """The parts of a run, as far as its optimizers."""

    @property
    def optimizers(self) -> Mapping[str, Optimizer]:
        """Every optimizer, by name."""


class Governed(Protocol):
    """A run that grows, as far as its governor goes; :class:`esper.Growth` is one."""

    @property
    def parts(self) -> Optimized:
        """The run's parts."""

    @property
    def morphable(self) -> MorphableModel:
        """The host, wrapped."""

    @property
    def orchestrator(self) -> SeedOrchestrator:
        """Who takes seeds through their lives."""

    @property
    def tamiyo(self) -> Tamiyo:
        """Who learns what came of a seed."""

    @property
    def batches(self) -> Clearable:
        """Recent training batches."""

    @property
    def steps(self) -> int:
        """Optimizer steps acted on."""

    @property
    def paused(self) -> bool:
        """Whether no new decision is taken."""

    def pause(self) -> None:
        """Take no new decision."""

    def resume(self) -> None:
        """Decide again."""

    def tell(self, kind: str, **data: object) -> None:
        """Emit an event."""


class WatchState(TypedDict):
    """What a checkpoint keeps of a governed run."""

    snapshots: NotRequired[list[SnapshotState]]
    governor: GovernorState
    watcher: ReaderState
    paused_before: bool
    silent: int
    metered: bool
    examiner: ExaminerState


class GovernorHooks:
    """Governs one run.

    Args:
        growth: Run to govern.
        settings: Ladders and step counts of the governor; None: the defaults.
        averages: Averaged copies of the host, which go back too.
        stateful: Schedulers and scaler, which go back too.
        captures: Readers and writers of what else goes back, by name, see ``Snapshots``.
    """

    def __init__(
        self,
        growth: Governed,
        settings: Settings | None = None,
        averages: Sequence[nn.Module] = (),
        stateful: Sequence[Stateful] = (),
        captures: Mapping[str, Capture] | None = None,
    ) -> None:
        self.growth, self.settings = growth, settings or Settings()
        self.model, self.orchestrator = growth.morphable, growth.orchestrator
        actions = Actions(self._notify, self._hold, self._release, self._roll_back, self._stop)
        self.governor = Governor(self.settings, actions)
        optimizers, peers = growth.parts.optimizers, self.orchestrator.services.peers
        self.watcher = VitalsReader(self.model.host, optimizers)
        self.examiner = Examiner(self.orchestrator)
        self.snapshots = Snapshots(
            [self.model.host, *averages], optimizers, stateful, captures, every=peers.all_ranks
        )
        self.paused_before = False
        self.metered = False  # whether a step's cost is known
        self.silent = 0  # steps in which no gradient reached the exposed kernel
        self.snapshots.take(growth.steps)

    def step(self, loss: float, step: int) -> Action | None:
        """Look at a step right after the optimizer's, before growth acts on it.

        Args:
            loss: Of the step; it need not be finite.
            step: Its number.

        Returns:
            What was done; after "rollback" the host is an earlier one, and growth has nothing to do.
        """
        flops = 3.0 * self.model.flops * self.orchestrator.examples
        if not self.metered and flops > 0:  # once: another share would be another norm
            self.watcher.reading, self.metered = Reading.of(flops, self.model.parameter_count()), True
            self.watcher.chosen.clear()
            self.examiner.share = self.watcher.reading.share
        least: Action = self.settings.exposed if self.exposed() else "notify"
        action = self.governor.check(self.together(self.watcher.read(loss)), step, least)
        if action != "rollback":
            action = self.examine(step) or action
        if action != "rollback":
            self.keep(step)
        return action

    def together(self, vitals: Vitals) -> Vitals:
        """Make the vital signs the same in every process: gradients may be shards, buffers are one's own."""
        peers = self.orchestrator.services.peers
        if peers.world == 1 or (vitals.gradient is None and vitals.weights is None):
            return vitals
        # The mean of squares: what is not finite in one process is so in all of them.
        squares = (vitals.gradient or 0.0) ** 2, float(vitals.weights is not False)
        both = torch.tensor(squares, dtype=torch.float64, device=next(self.model.host.parameters()).device)
        peers.all_reduce_mean([both])
        square, sound = both.tolist()
        gradient = None if vitals.gradient is None else math.sqrt(square)
        return Vitals(vitals.loss, gradient, None if vitals.weights is None else sound == 1.0, vitals.rate)

    def examine(self, step: int, last: bool = False) -> Action | None:
        """Examine the seed that is awake.

        Args:
            step: That has been done.
            last: Whether it is about to become part of the host: call it before ``finish`` folds it in.

        Returns:
            "rollback" where the host is an earlier one now, and the seed is gone.
        """
        finding = self.examiner.last_look(step) if last else self.examiner.look(step)
        if finding is not None:
            return self.governor.undo(finding, EXCUSED)
        self.drop_dead()
        return None

    def drop_dead(self) -> None:
        """Drop an exposed seed that no gradient reaches or that gives nothing: it would be kept."""
        trial = self.orchestrator.oldest
        if not isinstance(trial, Exposed):
            self.silent = 0
            return
        gradients = [p.grad for p in trial.kernel.parameters() if p.grad is not None]
        self.silent = 0 if gradients and total(norms(gradients, 1.0, 0)) != 0.0 else self.silent + 1
        what = "no gradient reached it" if self.silent >= SILENT else "it gave nothing"
        if max(self.silent, self.examiner.silent) >= SILENT:
            self.silent = 0
            self.drop(f"dead: {what} in {SILENT} steps")

    def keep(self, step: int) -> None:
        """Take a snapshot where one is due and nothing of a seed is in the host's output."""
        if self.exposed() or self.governor.detector.doubts() or self.governor.trouble is not None:
            return
        ring = self.snapshots.ring
        if not ring or step - ring[-1].step >= self.settings.every:
            self.snapshots.take(step)

    def reshaped(self) -> None:
        """Forget snapshots and readings of the model's earlier shapes."""
        self.snapshots.clear()
        self.watcher.kept.clear()
        self.watcher.chosen.clear()
        self.metered = False

    def moved(self, site: str, target: Stage, step: int) -> None:
        """Expect what a stage does to the loss, and keep what there was before it."""
        if target is Stage.GERMINATED:
            self.examiner.wake(step)
            if not self.snapshots.ring or self.snapshots.ring[-1].step < step:
                self.snapshots.take(step)  # before anything of the seed has run
        if target is Stage.GRAFTING and not self.examiner.expose(step):
            return  # undone at the next step; what is there now is no snapshot to go back to
        if target not in (Stage.GRAFTING, Stage.FOSSILISED):
            return
        ramp = self.orchestrator.timing.ramp if target is Stage.GRAFTING else 0
        why = f"{target.name} at {site}"
        self.governor.expect(step, why, ramp + self.settings.grace, EXCUSED)
        self.snapshots.take(step)  # before the host feels the seed; behind the commit

    def expect(self, step: int, why: str, steps: int | None = None) -> None:
        """Expect a discontinuity of the user's own."""
        self.governor.expect(step, why, steps)

    def exposed(self) -> bool:
        """Tell whether a seed takes part in the host's output."""
        return bool(self.orchestrator.exposed)

    def close(self) -> None:
        """Take the hooks away and forget the snapshots."""
        self.watcher.close()
        self.snapshots.clear()

    # -- the actions -----------------------------------------------------------------------------------------

    def _notify(self, finding: Finding, action: Action) -> None:
        facts = {"alarm": finding.kind, "signal": finding.signal, "action": action, "since": finding.since}
        facts |= {"value": finding.value, "usual": finding.usual, "expected": finding.expected}
        self.growth.tell("alarm", **facts, message=f"{finding}; {action}")

    def _hold(self, finding: Finding) -> None:
        self.paused_before = self.growth.paused
        self.growth.pause()

    def _release(self) -> None:
        if not self.paused_before:
            self.growth.resume()

    def _roll_back(self, finding: Finding) -> int | None:
        """Bring the host back to before the evidence; the seed that is awake is dropped."""
        # A seed is what to blame where it leaks or is exposed, and the last snapshot has not felt it.
        blamed = self.exposed() or finding.signal == "seed"
        snapshot = self.snapshots.before(finding.since, 0 if blamed else LAG)
        trouble = self.governor.trouble
        if trouble is not None and not blamed:  # an alarm was only told before: what came of it goes, too
            snapshot = self.snapshots.before(min(trouble, finding.since), LAG) or snapshot
        if snapshot is None:
            return None
        reason = f"rolled back to step {snapshot.step}: {finding}"
        self.drop(reason, Stage.ROLLED_BACK)
        self.examiner.undone()
        self.snapshots.restore(snapshot)
        self.orchestrator.losses.clear()  # of steps that are undone
        self.growth.batches.clear()  # the fault may be in them
        lost = finding.step - snapshot.step
        facts = {"to": snapshot.step, "lost": lost, "lost_in_all": self.governor.lost + lost}
        self.growth.tell("rolled_back", **facts, message=f"{reason}; {lost} steps are lost")
        return lost

    def drop(self, reason: str, way: Stage = Stage.CULLED) -> None:
        """End the seed that is awake, on its way through a stage; the site cools down as after any cull."""
        orchestrator = self.orchestrator
        trial = orchestrator.oldest
        if trial is None:
            return
        if way is not Stage.CULLED and orchestrator.stage_of(trial) in AWAKE:
            trial = orchestrator.move(trial, way, reason)
        self.growth.tamiyo.learn(orchestrator.cull(trial, reason), orchestrator.step)

    def _stop(self, finding: Finding) -> None:
        raise LossError(
            f"the governor stopped the run: {finding}; {self.governor.lost} steps were rolled back before. "
            "Lower the learning rate, clip gradients or check the data"
        )

    def state_dict(self) -> WatchState:
        """Return what a checkpoint keeps; without the snapshots a resumed run could not go back."""
        return {
            "snapshots": self.snapshots.state_dict(),
            "governor": self.governor.state_dict(),
            "watcher": self.watcher.state_dict(),
            "paused_before": self.paused_before,
            "silent": self.silent,
            "metered": self.metered,
            "examiner": self.examiner.state_dict(),
        }

    def load_state_dict(self, state: WatchState) -> None:
        """Go on watching."""
        self.governor.load_state_dict(state["governor"])
        self.watcher.load_state_dict(state["watcher"])
        self.snapshots.load_state_dict(state.get("snapshots", []))
        self.paused_before, self.silent = state["paused_before"], state["silent"]
        self.metered, self.examiner.share = state["metered"], self.watcher.reading.share
        self.examiner.load_state_dict(state["examiner"])
