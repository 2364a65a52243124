"""Ties a governor to a run that grows: who reads, who is told, what goes back.

Growth goes forward when the host goes back. A rollback ends the seed that is awake (ROLLED_BACK, then
CULLED); what Tamiyo has learned, the gate's looks and the cost stay spent: restored, the same decision would
come again. Snapshots are taken only while no seed is exposed, the last one right before an exposure, so the
way back leads to a host that never felt the seed; a commit clears the ring and begins it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from esper.contracts import Event, Stage
from esper.errors import LossError
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.orchestrator import SeedOrchestrator
from esper.kasmina.state import AWAKE
from esper.tolaria.governor.detectors import Finding
from esper.tolaria.governor.governor import Action, Actions, Governor, Settings
from esper.tolaria.governor.rollback import LAG, Capture, Snapshots
from esper.tolaria.governor.vitals import Reading, Watcher, norms, total

GRAFTING, FOSSILISED = Stage.GRAFTING.name, Stage.FOSSILISED.name
SILENT = 4  # steps without any gradient after which an exposed kernel is dead
EXCUSED = 2.5  # e-folds a graft may lift the loss by; a judged one lowers it


class Watch:
    """Governs one run.

    Args:
        growth: The conductor: ``parts``, ``morphable``, ``orchestrator``, ``tamiyo``, ``pause``, ``resume``,
            ``tell``.
        settings: Of the governor.
        averages: EMA copies, which go back too.
        stateful: Schedulers and scaler, which go back too.
        captures: What else goes back, see ``Snapshots``.
    """

    def __init__(
        self,
        growth: Any,
        settings: Settings | None = None,
        averages: Sequence[nn.Module] = (),
        stateful: Sequence[Any] = (),
        captures: Mapping[str, Capture] | None = None,
    ) -> None:
        self.growth, self.settings = growth, settings or Settings()
        self.model: MorphableModel = growth.morphable
        self.orchestrator: SeedOrchestrator = growth.orchestrator
        actions = Actions(self._notify, self._hold, self._release, self._roll_back, self._stop)
        self.governor = Governor(self.settings, actions)
        optimizers = growth.parts.optimizers
        self.watcher = Watcher(self.model.host, optimizers)
        self.snapshots = Snapshots([self.model.host, *averages], optimizers, stateful, captures)
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
        least: Action = self.settings.exposed if self.exposed() else "notify"
        action = self.governor.check(self.watcher.read(loss), step, least)
        if action != "rollback":
            self.examine()
            self.keep(step)
        return action

    def examine(self) -> None:
        """Drop an exposed seed that no gradient has reached for some steps: it is dead, and would be kept."""
        trial = self.orchestrator.trial
        if trial is None or trial.kernel is None:
            self.silent = 0
            return
        gradients = [p.grad for p in trial.kernel.parameters() if p.grad is not None]
        self.silent = 0 if gradients and total(norms(gradients, 1.0, 0)) != 0.0 else self.silent + 1
        if self.silent >= SILENT:
            self.silent = 0
            self.drop(f"dead: no gradient reached it in {SILENT} steps")

    def keep(self, step: int) -> None:
        """Take a snapshot where one is due and nothing of a seed is in the host's output."""
        if self.exposed() or self.governor.detectors.evidence > 0:
            return
        ring = self.snapshots.ring
        if not ring or step - ring[-1].step >= self.settings.every:
            self.snapshots.take(step)

    def told(self, event: Event) -> None:
        """Hear what growth tells: expect what a stage does to the loss, begin again behind a commit."""
        if event.kind in ("widened", "grafted"):
            self.snapshots.clear()
            self.watcher.kept.clear()
            self.metered = False
        if event.kind != "stage" or event.data["target"] not in (GRAFTING, FOSSILISED):
            return
        ramp = self.orchestrator.timing.ramp if event.data["target"] == GRAFTING else 0
        why = f"{event.data['target']} at {event.data['site']}"
        self.governor.expect(event.step, why, ramp + self.settings.grace, EXCUSED)
        self.snapshots.take(event.step)  # before the host feels the seed; behind the commit

    def exposed(self) -> bool:
        """Tell whether a seed takes part in the host's output."""
        trial = self.orchestrator.trial
        return trial is not None and trial.kernel is not None

    def close(self) -> None:
        """Take the hooks away and forget the snapshots."""
        self.watcher.close()
        self.snapshots.clear()

    # -- the actions -----------------------------------------------------------------------------------------

    def _notify(self, finding: Finding, action: Action) -> None:
        facts = {"alarm": finding.kind, "signal": finding.signal, "action": action, "since": finding.since}
        facts |= {"value": finding.value, "usual": finding.usual, "expected": finding.expected}
        self.growth.tell("warning", message=f"{finding}; {action}", **facts)

    def _hold(self, finding: Finding) -> None:
        self.paused_before = self.growth.paused
        self.growth.pause()

    def _release(self) -> None:
        if not self.paused_before:
            self.growth.resume()

    def _roll_back(self, finding: Finding) -> int | None:
        """Bring the host back to before the evidence; the seed that is awake is dropped."""
        # An exposed seed is what to blame, and the last snapshot has not felt it.
        snapshot = self.snapshots.before(finding.since, 0 if self.exposed() else LAG)
        if snapshot is None:
            return None
        reason = f"rolled back to step {snapshot.step}: {finding}"
        self.drop(reason, Stage.ROLLED_BACK)
        self.snapshots.restore(snapshot)
        self.orchestrator.losses.clear()  # of steps that are undone
        self.growth.batches.clear()  # the fault may be in them
        lost = finding.step - snapshot.step
        facts = {"to": snapshot.step, "lost": lost, "lost_in_all": self.governor.lost + lost}
        self.growth.tell("warning", message=f"{reason}; {lost} steps are lost", **facts)
        return lost

    def drop(self, reason: str, way: Stage = Stage.CULLED) -> None:
        """End the seed that is awake, on its way through a stage; the site cools down as after any cull."""
        orchestrator = self.orchestrator
        trial = orchestrator.trial
        if trial is None:
            return
        if way is not Stage.CULLED and self.model.layout.stage_of(trial.seed) in AWAKE:
            orchestrator.move(way, reason)
        self.growth.tamiyo.learn(orchestrator.cull(reason), orchestrator.step)

    def _stop(self, finding: Finding) -> None:
        raise LossError(
            f"the governor stopped the run: {finding}; {self.governor.lost} steps were rolled back before. "
            "Lower the learning rate, clip gradients or check the data"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps; snapshots are not in it, the checkpoint is one itself."""
        return {
            "governor": self.governor.state_dict(),
            "watcher": self.watcher.state_dict(),
            "paused_before": self.paused_before,
            "silent": self.silent,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on watching; the first snapshot is taken at the next step."""
        self.governor.load_state_dict(state["governor"])
        self.watcher.load_state_dict(state["watcher"])
        self.snapshots.clear()
        self.paused_before, self.silent = state["paused_before"], state["silent"]
