"""TRAINING: candidates learn beside the host; at the end they are compared, and the gate sees the best."""

from __future__ import annotations

from collections.abc import Sequence

from esper.batches.layout import Batch
from esper.config import Config
from esper.contracts import Stage
from esper.kasmina.race.lifecycle import Lifecycle
from esper.kasmina.race.needs import Services
from esper.kasmina.race.race import Race
from esper.kasmina.race.schedule import RaceSchedule, StepCost, Timing, first, lined_up
from esper.kasmina.race.selection import ask, select_winner, told
from esper.kasmina.race.survey import Measured
from esper.kasmina.race.trial import Germinated, Judged, Training
from esper.surgery.isolation.contexts import same_randomness, untouched

UNSEEN = 4  # batches the race is judged on, kept from the candidates


class Racing:
    """Runs the races of the seeds that train.

    Args:
        life: The seeds that are awake.
        config: Settings of the run.
        timing: Steps per stage.
    """

    def __init__(self, life: Lifecycle, config: Config, timing: Timing) -> None:
        self.life, self.model, self.config, self.timing = life, life.model, config, timing

    @property
    def services(self) -> Services:
        """What the run lends."""
        return self.life.services

    def line_up(self, trial: Germinated, measured: Measured, start: str, examples: int) -> Training:
        """Let a race begin.

        Args:
            trial: Its seams are open.
            measured: What a survey showed at its site.
            start: Mix of starts, a key of ``STARTS``.
            examples: Examples in a step.
        """
        services, origin, width = self.services, trial.origin, trial.origin.decision.width
        starts = lined_up(self.config.race, StepCost(self.model.flops, examples), start)
        with same_randomness(services.streams.draw("initialisation")):
            pool, rate = measured.survey, services.rate
            race = Race(origin.layer, width, starts, pool, measured.x, rate, services.peers)
            with services.ledger.growth("fit", origin.decision.id):
                race.fit(measured.x, measured.gradient, measured.scale)
        services.peers.broadcast_tensors([*race.stack.values()])  # machines round differently
        training = trial.training(race)
        origin.layer.tap = training.tap
        return self.life.move(training, Stage.TRAINING, f"{len(starts)} candidates of {width} units")

    def schedule(self, trial: Training, examples: int) -> RaceSchedule:
        """Plan a race by what the host's step costs; the same at every step of it."""
        site, units = trial.origin.layer.place.site, trial.origin.decision.width
        step = StepCost(self.model.flops, examples)
        return RaceSchedule.of(self.config.race, self.timing.incubate, step, site, units)

    def age(self, trial: Training) -> int:
        """Count the steps since a race began."""
        return self.life.step - trial.started

    def learning(self, trial: Training) -> bool:
        """Tell whether candidates learn at this step."""
        return self.age(trial) <= self.timing.incubate

    def over(self, trial: Training) -> bool:
        """Tell whether there are batches enough that no candidate has learned from."""
        return self.age(trial) >= self.timing.incubate + UNSEEN

    def learn(self, trial: Training, batches: Sequence[Batch], examples: int) -> None:
        """Take one lesson, and halve the field where that is due."""
        origin, race, ledger = trial.origin, trial.race, self.services.ledger
        age, total, size = self.age(trial), self.timing.incubate, len(race.starts)
        schedule = self.schedule(trial, examples)
        kind, seed = schedule.kind(age), self.services.streams.draw("evidence")
        fresh = kind == "tap" and self.services.peers.all_ranks(trial.tap.fresh())
        if kind == "shadow" or (kind == "tap" and schedule.tapped is None and not fresh):
            batch = first(batches[-1], schedule.examples)
            key = ("shadow", origin.decision.id, size, schedule.examples, examples)
            with self.services.wrapping.gathered(), untouched(self.model.host, seed), ledger.growth(*key):
                race.learn_from_shadow(lambda: self.services.passes.loss_of(batch))
        elif fresh:
            with same_randomness(seed), ledger.growth("tap", origin.decision.id, size, examples):
                race.learn_from_tap(trial.tap, schedule.tapped)
        following = age == total or schedule.kind(age + 1) == "tap"  # at the end, what the forge asks for
        origin.layer.tap = trial.tap if following else None
        if age in schedule.halvings and size > 1:
            race.halve()

    def judge(self, trial: Training, batches: Sequence[Batch], examples: int) -> Judged | None:
        """Pick a winner on training batches and let the gate look at it.

        Returns:
            None where doing nothing won.
        """
        unseen = batches[self.timing.incubate - self.age(trial) :]
        few = None if self.schedule(trial, examples).examples is None else examples
        joined = [first(batch, few) for batch in self.services.joins(unseen)]
        with self.services.wrapping.gathered():
            best = select_winner(trial, joined, self.services, self.model.host, examples)
            verdict = None if best.kernel is None else ask(trial, best.kernel, unseen, self.services)
        decision, site = trial.origin.decision.id, trial.origin.site
        self.life.tell("race", decision=decision, site=site, **best.facts)
        if best.kernel is None or verdict is None:
            return None
        self.life.tell_notes(trial)
        judged = self.life.put(trial.judged(best.kernel, verdict))
        self.life.tell("gate", decision=decision, site=site, **told(verdict))
        return judged
