"""The incubating recipe: places are surveyed, raced, gated and let in by degrees, each on its own.

One seed is awake at a time, or ``schedule.concurrent``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from esper.batches.examples import count_examples
from esper.contracts import Outcome
from esper.errors import EsperError
from esper.kasmina.race.race import AMPLITUDES
from esper.kasmina.race.racing import UNSEEN
from esper.kasmina.race.schedule import SHARE, StepCost, first
from esper.kasmina.race.survey import Measured, measure
from esper.kasmina.race.trial import Decaying, Evaluating, Germinated, Key, Passed, Training
from esper.kasmina.widths.places import gone
from esper.surgery.isolation.undisturbed import undisturbed
from esper.surgery.optimizers.foreign import kept_outside
from esper.tamiyo.controller import RemainingBudget
from esper.tolaria.growth.incubation.boundary import same_decision
from esper.tolaria.growth.incubation.redo import Redo
from esper.tolaria.growth.run.allowance import Allowance
from esper.tolaria.growth.run.proven import Proven
from esper.tolaria.growth.run.state import RunState
from esper.tolaria.growth.run.telling import decided, surveyed

POOL = 32  # directions a survey compares
HALVED = 1.75  # passes of a race per step of it: eight candidates, four, two, then one
SURVEYED = 32  # examples, on a host whose steps are dear


class Incubation:
    """Grows one run one place at a time.

    Args:
        run: What the run knows of itself.
        redo: What a process before decided.
        proven: What the model was like when its places were proven.
    """

    def __init__(self, run: RunState, redo: Redo, proven: Proven) -> None:
        self.run, self.parts, self.redo, self.proven = run, run.parts, redo, proven
        self.dear = ""  # why no decision is taken now

    def step(self, loss: float) -> None:
        """Do one step's work; what goes wrong in it ends the seed it was done for, not training."""
        with self.run.mishaps.contained("incubation", self.skip):
            self.act(loss)

    def skip(self, why: str) -> None:
        """Leave everything in order where a decision met an error: what it has woken sleeps again."""
        self.run.asked = None
        trials = self.run.orchestrator.trials
        for key in [key for key, trial in trials.items() if isinstance(trial, Germinated)]:
            self.drop(key, why)

    def drop(self, key: Key, why: str) -> None:
        """End a seed whose work met an error."""
        orchestrator = self.run.orchestrator
        if key in orchestrator.trials:
            orchestrator.cull(orchestrator.trials[key], why)
        self.conclude_all()

    def act(self, loss: float) -> None:
        """Go on with the seeds that are awake, and where another may be look whether a decision is due."""
        run, orchestrator = self.run, self.run.orchestrator
        self.conclude_all()  # Ctrl-C may have come between
        if self.parts.forging.orders:
            self.parts.forging.collect(run.steps)
        awake = list(orchestrator.trials)
        orchestrator.begin(loss, run.steps)
        for key in awake:
            if key in orchestrator.trials:  # else its place is another one since a neighbour was kept
                self.advance(key, loss)
        orchestrator.examples = 0
        if len(awake) >= run.config.schedule.concurrent:
            return
        if orchestrator.cooling():
            orchestrator.wake_embargoed(run.steps)
            if all(orchestrator.embargoed(name) for name in run.morphable.places):
                return
        why = run.tamiyo.due(run.steps, loss)
        if run.asked is not None:
            why = "asked for"
        why = self.redo.due(why)
        if why is not None and not run.paused:
            self.decide(why)

    def advance(self, key: Key, loss: float) -> None:
        """Do one seed's work."""
        run = self.run
        with run.mishaps.contained("incubation", partial(self.drop, key)):
            if why := self.overtaken(key):
                run.orchestrator.cull(run.orchestrator.trials[key], why)
            else:
                run.orchestrator.advance(key, tuple(run.batches), loss)
            self.conclude_all()

    def overtaken(self, key: Key, last: bool = False) -> str:
        """Say what the user has changed around a seed that is awake, so that it cannot grow; "" mostly.

        Asked where a verdict may fall: a walk over all modules at every step would cost.

        Args:
            key: Site and slot of the seed.
            last: Whether the run ends.
        """
        run, trial = self.run, self.run.orchestrator.trials[key]
        racing = isinstance(trial, Training) and run.steps - trial.started <= run.orchestrator.timing.incubate
        if trial.origin.lost(run.morphable.host) or isinstance(trial, Decaying):
            return ""  # the orchestrator says so itself
        if not last and (racing or not isinstance(trial, Training | Evaluating | Passed)):
            return ""
        refused = self.proven.refused(gone(run.morphable.host, run.morphable.places.values()))
        return refused.get(trial.origin.site, "")

    def settle(self, key: Key) -> Outcome | None:
        """End the run for a seed that is awake."""
        orchestrator = self.run.orchestrator
        why = self.overtaken(key, last=True)
        return orchestrator.cull(orchestrator.trials[key], why) if why else orchestrator.settle(key)

    def conclude_all(self) -> None:
        """Learn what decisions came to that nobody has learned from yet."""
        while self.run.orchestrator.untold:
            self.conclude()

    @undisturbed()
    def conclude(self) -> None:
        """Learn what one of them came to."""
        run = self.run
        outcome = run.orchestrator.untold.pop(0)
        run.events_kept += outcome.kept
        run.tamiyo.learn(outcome, run.steps)
        run.topology_changed()

    def decide(self, why: str) -> None:
        """Survey the free sites, let Tamiyo choose, and germinate what was chosen."""
        orchestrator = self.run.orchestrator
        with self.parts.wrapping.gathered(), orchestrator.paying(None), orchestrator.aside(None):
            self.choose(why)

    def choose(self, why: str) -> None:
        """Choose, with the whole model at hand."""
        run, places = self.run, self.run.morphable.places
        only, run.asked = run.asked, None
        shut = self.shut(only)
        free = [n for n in places if n not in shut and only in (None, n)]
        self.dear = (
            kept_outside(self.parts.committer.optimizers)
            or self.parts.gate.too_few(count_examples(run.batches[-1]))
            or Allowance(run).declined(self.price() + self.promised())
        )
        measured = self.survey(free)
        sites = [places[n].site for n in free]
        reports = {name: m.report for name, m in measured.items()}
        rng = self.parts.streams.generators["policy"]
        own = run.tamiyo.decide(run.steps, why, sites, reports, self.remaining_budget(), rng, only)
        decision = self.redo.journalled_or(own, measured)
        decision = same_decision(run.peers, decision, list(places))
        if decision is not own:
            run.tamiyo.adopt(decision)
        run.tell("survey", decision=decision.id, sites=surveyed(measured, run.morphable))
        run.tell("decision", **decided(decision))
        if decision.site is not None:
            latest = count_examples(run.batches[-1])
            run.orchestrator.germinate(decision, measured[decision.site], run.steps, latest)

    def shut(self, asked: str | None) -> set[str]:
        """Return the places where nothing can be tried now; those that a change has shut are told once.

        A seed wakes beside another of its site only where the user asks for it, and none is judged there.
        """
        run, places = self.run, self.run.morphable.places
        lost = gone(run.morphable.host, places.values())
        refused = self.proven.refused(lost)
        for name, missing in lost.items():
            run.mishaps.say(f"{name} can no longer grow: {missing}")
        for name in refused:
            run.mishaps.say(f"{name} is left out: {refused[name]}", f"left out: {name}")
        return self.busy(asked) | lost.keys() | refused.keys()

    def busy(self, asked: str | None) -> set[str]:
        """Return the places that cool down, or where a seed is awake and another one may not be."""
        orchestrator, places = self.run.orchestrator, self.run.morphable.places
        taken = {site for site, _ in orchestrator.trials}
        if asked in taken and not orchestrator.judging(asked) and orchestrator.slot(asked) is not None:
            taken.remove(asked)
        return taken | {name for name in places if orchestrator.embargoed(name)}

    def remaining_budget(self) -> RemainingBudget:
        """Return what the budget allows; no event that could not be paid for."""
        room = self.run.remaining_budget()
        return replace(room, events=0) if self.dear else room

    def survey(self, free: Sequence[str]) -> dict[str, Measured]:
        """Measure free sites on recent batches: joined ones, unless the model runs on each of them only."""
        if not free:
            return {}
        if self.dear:
            self.run.mishaps.say(f"a decision was declined: {self.dear}", self.dear[:20])
            return {}
        joins, seed = self.parts.joins, self.parts.streams.draw("evidence")
        try:
            return self.measured(free, seed)
        except Exception as error:  # the user's model and loss run here: they raise what they like
            alone = joins.apart or len(self.run.batches) < 2 or self.run.peers.world > 1
            if alone or isinstance(error, EsperError):
                raise
            joins.apart = True
            found = self.measured(free, seed)
            reason = f"{type(error).__name__}: {error}"
            why = f"batches were looked at one by one, for joined ones do not run: {reason}"
            self.run.tell("fallback", what="evidence", why=why)
            return found

    def price(self) -> int:
        """Return about what a decision costs: a survey, a race, its final, and the gate's look."""
        run, race = self.run, self.run.config.race
        latest = count_examples(run.batches[-1])
        seen = sum(count_examples(batch) for batch in run.batches)
        lessons = 3 * HALVED * run.orchestrator.timing.incubate * latest
        if StepCost(run.morphable.flops, latest).large(race):
            lessons = int(3 * SHARE * run.orchestrator.timing.incubate * latest)
        final = (race.candidates + len(AMPLITUDES)) * UNSEEN * latest
        return int(run.morphable.flops * (3 * seen + lessons + final + 2 * latest))

    def promised(self) -> int:
        """Return about what the races under way may still cost; each has been paid for in thought."""
        racing = [t for t in self.run.orchestrator.trials.values() if isinstance(t, Training)]
        return self.price() * len(racing)

    def measured(self, free: Sequence[str], seed: int) -> dict[str, Measured]:
        """Measure free sites once."""
        run, morphable, settings = self.run, self.run.morphable, self.run.config.race
        facts = tuple(place.site.width for place in morphable.places.values()), len(run.plans)
        latest = count_examples(run.batches[-1])
        few = SURVEYED if StepCost(morphable.flops, latest).large(settings) else None
        batches = [first(batch, few) for batch in self.parts.joins(run.batches)]
        examples = tuple(count_examples(batch) for batch in batches)
        runs = [lambda b=batch: self.parts.loss_of(b) for batch in batches]
        with run.cost.growth("survey", facts, tuple(free), examples):
            return measure(morphable, free, runs, seed, POOL, settings.examples, run.peers)
