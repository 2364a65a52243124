"""``SeedOrchestrator``: takes seeds through their lives, a step at a time; several may be awake at once.

What it needs of other rooms is lent to it: how to run the model, how to make an optimizer like the host's,
how to commit a widening. Each seed is judged on its own: passes for one leave no trace in the others, and
what one costs or adds is none of theirs. Where one is kept, those that stand elsewhere go on, and those whose
place has changed its shape are culled.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from esper.batches.layout import Batch
from esper.config import Config
from esper.contracts import Decision, Outcome, Stage
from esper.errors import TransitionError
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.exposing import Exposing
from esper.kasmina.race.lifecycle import FaultReport, Lifecycle
from esper.kasmina.race.needs import Services
from esper.kasmina.race.racing import Racing
from esper.kasmina.race.schedule import Timing
from esper.kasmina.race.survey import Measured
from esper.kasmina.race.trial import (
    Baseline,
    Exposed,
    Germinated,
    Judged,
    Key,
    Origin,
    Passed,
    Training,
    Trial,
)
from esper.kasmina.seeds.layer import KasminaLayer
from esper.surgery.isolation.undisturbed import undisturbed

TREND = 20  # losses before exposure that a graft is compared with, at least


class SeedOrchestrator(Lifecycle):
    """Applies decisions to the seeds of one model.

    Args:
        model: Owner of sites, seeds and their state.
        config: Settings of the run.
        timing: Steps per stage.
        services: What the run lends.

    Attributes:
        examples: Since the last step, for the cost of an exposed branch.
        losses: The latest of steps in which no kernel was exposed.
        mixed: The latest of those since in which one was; noted where several seeds may be awake.
    """

    def __init__(self, model: MorphableModel, config: Config, timing: Timing, services: Services) -> None:
        super().__init__(model, services, timing)
        self.config = config
        self.racing, self.exposing = Racing(self, config, timing), Exposing(self, timing)
        self.examples = 0
        self.losses: deque[float] = deque(maxlen=max(TREND, 2 * timing.evaluate))
        self.mixed: deque[float] = deque(maxlen=self.losses.maxlen)

    @property
    def oldest(self) -> Trial | None:
        """The trial that has been under way the longest; None while every seed sleeps."""
        return next(iter(self.trials.values()), None)

    @property
    def exposed(self) -> list[Exposed]:
        """The trials whose kernels are in the host's output."""
        return [trial for trial in self.trials.values() if isinstance(trial, Exposed)]

    def judging(self, site: str) -> bool:
        """Tell whether a seed of a site is being judged; another one there waits until it is decided."""
        return any(t.origin.site == site for t in self.trials.values() if isinstance(t, Judged | Exposed))

    def slot(self, site: str) -> int | None:
        """Return the first slot of a site whose seed sleeps; None where there is none."""
        stages = enumerate(map(self.model.layout.stage_of, self.model.seeds(site)))
        return next((slot for slot, stage in stages if stage is Stage.DORMANT), None)

    def wake(self, site: str, slot: int) -> KasminaLayer:
        """Open the seams for a seed."""
        return self.model.layer(site, FaultReport(self, (site, slot)), slot)

    # -- from a decision to its outcome ----------------------------------------------------------------------

    @undisturbed()
    def germinate(self, decision: Decision, measured: Measured, step: int, examples: int = 0) -> None:
        """Wake a seed at the decided site and line up its candidates.

        Raises:
            TransitionError: The decision names no site, or no seed sleeps there.
        """
        site, start, self.step = decision.site, decision.start, step
        slot = None if site is None else self.slot(site)
        if site is None or start is None or slot is None:
            raise TransitionError(
                f"decision {decision.id}, {decision.action} at {site}, finds no seed to wake"
            )
        baseline = Baseline(self.services.ledger.growth_flops, self.model.parameter_count(), self.model.flops)
        seed = self.model.seeds(site)[slot]
        origin = Origin(decision, site, slot, seed, self.wake(site, slot), baseline)
        germinated = self.move(Germinated(origin, step), Stage.GERMINATED, decision.reason)
        self.racing.line_up(germinated, measured, start, examples)

    def begin(self, loss: float, step: int) -> None:
        """Take in a step, before any seed acts on it."""
        self.step = step
        if self.exposed:
            self.model.layout.tick()
        doomed = False
        for trial in self.trials.values():
            if not trial.origin.lost(self.model.host):
                trial.origin.layer.told()
            doomed = bool(self.doomed(trial)) or doomed
        if any(trial.origin.layer.exposed for trial in self.trials.values()):
            if self.config.schedule.concurrent > 1:
                self.mixed.append(loss)
        elif not doomed:
            self.losses.append(loss)
            self.mixed.clear()

    def advance(self, key: Key, batches: Sequence[Batch], loss: float) -> Outcome | None:
        """Do one seed's work of a step; returns its outcome once there is one."""
        trial = self.trials[key]
        if why := self.doomed(trial):
            return self.cull(trial, why)
        with self.paying(key):
            match trial:
                case Germinated():
                    return self.cull(trial, "its candidates were never lined up")
                case Training():
                    return self.incubate(trial, batches)
                case Judged():
                    return self.let_in(trial)
                case Exposed():
                    return self.exposing.step(trial, loss, self.examples)

    def incubate(self, trial: Training, batches: Sequence[Batch]) -> Outcome | None:
        """TRAINING: learn beside the host; at the end race, and ask the gate."""
        key = trial.origin.key
        with self.aside(key):
            if self.racing.learning(trial):
                self.racing.learn(trial, batches, self.examples)
                return None
            if not self.racing.over(trial) or self.judging(trial.origin.site):
                return None
            judged = self.racing.judge(trial, batches, self.examples)
        return self.cull(trial, "doing nothing won the race") if judged is None else self.let_in(judged)

    def let_in(self, trial: Judged) -> Outcome | None:
        """Expose a winner that the gate lets pass; cull any other."""
        verdict = trial.verdict
        if not verdict.passed or verdict.gain is None:
            return self.cull(trial, verdict.reason)
        self.model.layout.observe_gain(trial.origin.seed, verdict.gain)
        beside = len(self.mixed) > 1 and bool(self.exposed)  # what others did to the loss is not this one's
        self.exposing.expose(trial, self.mixed if beside else self.losses)
        return None

    def commit_waiting(self, key: Key) -> Outcome | None:
        """Make a kernel that has passed, and waits for it, part of the user's layers."""
        trial = self.trials[key]
        if not isinstance(trial, Passed):
            return None
        with self.paying(key):
            why = self.doomed(trial)
            return self.cull(trial, why) if why else self.exposing.fossilise(trial)

    def settle(self, key: Key) -> Outcome:
        """End the run for a seed: an exposed one is kept if held-out examples still gain by it."""
        trial = self.trials[key]
        with self.paying(key):
            if why := self.doomed(trial):
                return self.cull(trial, why)
            if not isinstance(trial, Exposed):
                return self.cull(trial, "the run ended")
            return self.exposing.settle(trial)
