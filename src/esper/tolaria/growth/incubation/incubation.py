"""The incubating recipe: one place at a time is surveyed, raced, gated and let in by degrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from esper.batches.examples import count_examples
from esper.contracts import Outcome
from esper.errors import EsperError
from esper.kasmina.race.orchestrator import UNSEEN
from esper.kasmina.race.race import AMPLITUDES
from esper.kasmina.race.schedule import SHARE, Step, first
from esper.kasmina.race.survey import Measured, measure
from esper.tamiyo.controller import Room
from esper.tolaria.growth.incubation.boundary import same_decision
from esper.tolaria.growth.run.allowance import Allowance
from esper.tolaria.growth.run.telling import decided, surveyed

POOL = 32  # directions a survey compares
HALVED = 1.75  # passes of a race per step of it: eight candidates, four, two, then one
SURVEYED = 32  # examples, on a host whose steps are dear


class Incubation:
    """Grows one run one place at a time.

    Args:
        growth: The conductor: ``parts``, ``morphable``, ``orchestrator``, ``tamiyo``, ``redo``, ``batches``,
            ``mishaps``.
    """

    def __init__(self, growth: Any) -> None:
        self.growth, self.parts = growth, growth.parts
        self.dear = ""  # why a decision could not be paid for

    def step(self, loss: float) -> None:
        """Do one step's work; what goes wrong in it ends the seed that is awake, not training."""
        with self.growth.mishaps.contained("incubation", self.skip):
            self.act(loss)

    def skip(self, why: str) -> None:
        """Leave everything in order where a decision or a seed met an error."""
        self.growth.asked = None
        if self.growth.orchestrator.trial is not None:
            self.conclude(self.growth.orchestrator.cull(why))

    def act(self, loss: float) -> None:
        """Go on with the seed that is awake, or look whether a decision is due."""
        growth, orchestrator = self.growth, self.growth.orchestrator
        if self.parts.forging.orders:
            self.parts.forging.collect(growth.steps)
        if orchestrator.trial is not None:
            outcome = orchestrator.advance(tuple(growth.batches), loss, growth.steps)
            if outcome is not None:
                self.conclude(outcome)
            return
        orchestrator.advance(tuple(growth.batches), loss, growth.steps)
        if orchestrator.cooling():
            orchestrator.wake_embargoed(growth.steps)
            if all(orchestrator.embargoed(name) for name in growth.morphable.places):
                return
        why = growth.tamiyo.due(growth.steps, loss)
        if growth.asked is not None:
            why = "asked for"
        why = growth.redo.due(why)
        if why is not None and not growth.paused:
            self.decide(why)

    def conclude(self, outcome: Outcome) -> None:
        """Learn what a decision came to."""
        growth = self.growth
        growth.events_kept += outcome.kept
        growth.tamiyo.learn(outcome, growth.steps)
        growth.topology_changed()

    def decide(self, why: str) -> None:
        """Survey the free sites, let Tamiyo choose, and germinate what was chosen."""
        with self.parts.wrapping.whole():
            self.choose(why)

    def choose(self, why: str) -> None:
        """Choose, with the whole model at hand."""
        growth, places = self.growth, self.growth.morphable.places
        only, growth.asked = growth.asked, None
        free = [n for n in places if not growth.orchestrator.embargoed(n) and only in (None, n)]
        self.dear = Allowance(growth).declined(self.price())
        measured = self.survey(free)
        sites = [places[n].site for n in free]
        reports = {name: m.report for name, m in measured.items()}
        rng = self.parts.streams.generators["policy"]
        own = growth.tamiyo.decide(growth.steps, why, sites, reports, self.room(), rng, only)
        decision = growth.redo.instead(own, measured)
        decision = same_decision(growth.peers, decision, list(places))
        if decision is not own:
            growth.tamiyo.adopt(decision)
        growth.tell("survey", decision=decision.id, sites=surveyed(measured, growth.morphable))
        growth.tell("decision", **decided(decision))
        if decision.site is not None:
            latest = count_examples(growth.batches[-1])
            growth.orchestrator.germinate(decision, measured[decision.site], growth.steps, latest)

    def room(self) -> Room:
        """Return what the budget allows; no event that could not be paid for."""
        room = self.growth.room()
        return replace(room, events=0) if self.dear else room

    def survey(self, free: Sequence[str]) -> dict[str, Measured]:
        """Measure free sites on recent batches: joined ones, unless the model runs on each of them only."""
        if not free:
            return {}
        if self.dear:
            self.growth.mishaps.say(f"a decision was declined: {self.dear}", "growth_flops")
            return {}
        joins, seed = self.parts.joins, self.parts.streams.draw("evidence")
        try:
            return self.measured(free, seed)
        except Exception as error:  # the user's model and loss run here: they raise what they like
            alone = joins.apart or len(self.growth.batches) < 2 or self.growth.peers.world > 1
            if alone or isinstance(error, EsperError):
                raise
            joins.apart = True
            found = self.measured(free, seed)
            reason = f"{type(error).__name__}: {error}"
            why = f"batches were looked at one by one, for joined ones do not run: {reason}"
            self.growth.tell("fallback", what="evidence", why=why)
            return found

    def price(self) -> int:
        """Return about what a decision costs: a survey, a race, its final, and the gate's look."""
        growth, race = self.growth, self.growth.config.race
        latest = count_examples(growth.batches[-1])
        seen = sum(count_examples(batch) for batch in growth.batches)
        lessons = 3 * HALVED * growth.orchestrator.timing.incubate * latest
        if Step(growth.morphable.flops, latest).large(race):
            lessons = int(3 * SHARE * growth.orchestrator.timing.incubate * latest)
        final = (race.candidates + len(AMPLITUDES)) * UNSEEN * latest
        return int(growth.morphable.flops * (3 * seen + lessons + final + 2 * latest))

    def measured(self, free: Sequence[str], seed: int) -> dict[str, Measured]:
        """Measure free sites once."""
        growth, morphable, settings = self.growth, self.growth.morphable, self.growth.config.race
        facts = tuple(place.site.width for place in morphable.places.values()), len(growth.plans)
        latest = count_examples(growth.batches[-1])
        few = SURVEYED if Step(morphable.flops, latest).large(settings) else None
        batches = [first(batch, few) for batch in self.parts.joins(growth.batches)]
        examples = tuple(count_examples(batch) for batch in batches)
        runs = [lambda b=batch: self.parts.run(b) for batch in batches]
        with growth.cost.growth("survey", facts, tuple(free), examples):
            return measure(morphable, free, runs, seed, POOL, settings.examples, growth.peers)
