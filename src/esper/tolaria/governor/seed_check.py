"""Examines the seed that is awake: whether it keeps to itself, is alive, and leaves the host better off.

"Remove it and see what gets worse" rewards a parasite: the host comes to lean on it. So besides the gate's
on-against-off before exposure, the held-out loss with the seed is compared with what it was before the host
ever felt it. And once a kernel is part of the host nobody catches its faults, so one that failed is not kept.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TypedDict

import numpy as np

from esper.blueprints.kernel import LiveKernel
from esper.contracts import Stage
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.race.trial import Decaying, Exposed, Germinated, Training, Trial
from esper.kasmina.seeds.layer import Branch
from esper.nissa.detectors import Finding, Kind
from esper.surgery.isolation.contexts import borrowed_buffers, evaluating, same_randomness
from esper.tolaria.governor.side_effects import AllowedEffects, HostFingerprint, find_side_effects, rights

SILENT = 4  # steps without a gradient or an output after which an exposed kernel is dead
BEYOND = 2.0  # standard errors the held-out loss may have risen by


class ExaminerState(TypedDict):
    """What a later look depends on."""

    steps: list[int]  # last clean one, exposure, silent ones, turn
    before: list[float] | None  # held-out losses ahead of exposure


class Examiner:
    """Looks at one seed after another.

    Args:
        orchestrator: Whose seeds they are.
    """

    def __init__(self, orchestrator: SeedOrchestrator) -> None:
        self.orchestrator, self.host = orchestrator, orchestrator.model.host
        self.share, self.turn = 1.0, 0
        self.clean = 0  # the last step at which all was well
        self.exposed = 0  # step of the exposure
        self.silent = 0
        self.before: list[float] | None = None  # held-out losses ahead of exposure
        self.sealed: HostFingerprint | None = None  # the host when the seed woke
        self.allowed: AllowedEffects | None = None
        self.suspected = ""

    def wake(self, step: int) -> None:
        """A seed has germinated; it has not run yet."""
        self.clean, self.silent, self.before = step, 0, None
        self.sealed, self.allowed, self.suspected = HostFingerprint(self.host, 0.0), None, ""

    def expose(self, step: int) -> bool:
        """Note what the host is like before it feels the seed; False where the seed is suspect already."""
        self.exposed, self.silent = step, 0
        for trial in self.orchestrator.exposed:
            self.suspected = self.together(self.audit(trial))
            self.before = self.held_out(trial, None)
        return not self.suspected

    def look(self, step: int) -> Finding | None:
        """Examine the seed after a step."""
        trial = self.orchestrator.oldest
        if trial is None:
            self.sealed = None
            return None
        why, self.suspected = self.suspected or self.together(self.audit(trial)), ""
        if why:
            return self.finding("leak", why, step, self.clean + 1)
        self.clean = step
        return self.last_look(step) if self.ends_now(trial) else None

    def last_look(self, step: int) -> Finding | None:
        """Say what speaks against keeping an exposed seed, before it is made part of the host."""
        trial = self.orchestrator.oldest
        if not isinstance(trial, Exposed) or isinstance(trial, Decaying):
            return None
        if faults := int(self.orchestrator.model.layout.faults[trial.origin.seed]):
            why = f"it failed {faults} times beside the host, and within it nobody would catch that"
            self.orchestrator.turn_back(trial, why)
            return None
        if not self.before:
            return None  # resumed from a checkpoint of an older version
        found = self.rise(np.asarray(self.held_out(trial, trial.origin.layer.kernel)))
        rise, error = self.orchestrator.services.peers.broadcast_floats(found)
        if rise <= BEYOND * error:
            return None
        why = f"the held-out loss is {rise:.3g} ± {error:.2g} above what it was before exposure"
        return self.finding("harm", why, step, self.exposed + 1)

    def rise(self, after: np.ndarray) -> tuple[float, float]:
        """Return the mean paired rise of the held-out losses and its standard error."""
        rises = after - np.asarray(self.before)
        if not np.isfinite(rises).all():
            return math.inf, 0.0
        error = float(rises.std(ddof=1)) / math.sqrt(len(rises)) if len(rises) > 1 else 0.0
        return float(rises.mean()), error

    def ends_now(self, trial: Trial) -> bool:
        """Tell whether the step that is due is the last of the evaluation."""
        stage, evaluate = self.orchestrator.stage_of(trial), self.orchestrator.timing.evaluate
        return isinstance(trial, Exposed) and stage is Stage.EVALUATING and len(trial.losses) + 1 == evaluate

    def finding(self, kind: Kind, why: str, step: int, since: int) -> Finding:
        """Write it down."""
        return Finding(kind, "seed", step, None, None, None, since, what=why)

    def held_out(self, trial: Exposed, kernel: LiveKernel | None) -> list[float]:
        """Return every held-out example's loss with a kernel at full strength, or without any."""
        gate, seed = self.orchestrator.services.gate, 0
        found: list[float] = []
        key = ("held out", trial.origin.decision.id, kernel is None)
        with self.orchestrator.services.ledger.growth(*key), evaluating(self.host):
            for batch in gate.probe:
                found += gate.losses(trial.origin.layer, kernel, batch, seed).tolist()
        return found

    def together(self, audited: tuple[str, bool]) -> str:
        """Say what is wrong in any process, and count the steps in which the kernel is silent in all."""
        peers, (why, silent) = self.orchestrator.services.peers, audited
        if peers.world > 1:
            answers = peers.all_gather_ints([int(bool(why)), int(silent)])
            silent = all(row[1] for row in answers)
            guilty = [rank for rank, row in enumerate(answers) if row[0]]
            why = why or (f"it misbehaves in process {guilty[0]}" if guilty else "")
        self.silent = self.silent + 1 if silent else 0
        return why

    def audit(self, trial: Trial) -> tuple[str, bool]:
        """Run the seed's kernel once more, or one of its candidates, and watch what it does.

        Returns:
            What it does that it may not, and whether it is exposed and gives nothing.
        """
        x, kernel = None if isinstance(trial, Germinated) else trial.tap.x, trial.origin.layer.kernel
        race = trial.race if isinstance(trial, Training) else None
        if x is None:
            return "", False
        if self.sealed is not None and any(self.sealed.added()):
            return "it hooks into the host", False
        run: Branch
        if kernel is not None:
            run, own, stateful = kernel.forward, [*kernel.parameters()], kernel
        elif race is None:
            return "", False
        else:
            run, own, stateful = (
                partial(race.branch, race.rows()[0]),
                [*race.parameters.values()],
                race.template,
            )
        self.turn += 1
        with same_randomness(), borrowed_buffers(stateful):
            if self.allowed is None or self.allowed.shape != x.shape:
                fresh = trial.origin.layer.place.kernel(trial.origin.decision.width).train()
                self.allowed = rights(fresh, x, fresh.parameters())
            seal = HostFingerprint(self.host, self.share, self.turn)
            why, nothing = find_side_effects(run, x, own, self.allowed, seal)
        return why, nothing and kernel is not None

    def undone(self) -> None:
        """The seed is gone: take away what it left behind that no snapshot holds."""
        if self.sealed is not None:
            self.sealed.unhook()
        self.sealed = None

    def state_dict(self) -> ExaminerState:
        """Return what a later look depends on."""
        return {"steps": [self.clean, self.exposed, self.silent, self.turn], "before": self.before}

    def load_state_dict(self, state: ExaminerState) -> None:
        """Go on looking; who listens to the host now did so before."""
        self.clean, self.exposed, self.silent, self.turn = state["steps"]
        self.before = None if state["before"] is None else list(state["before"])
        self.sealed = HostFingerprint(self.host, 0.0) if self.orchestrator.trials else None
