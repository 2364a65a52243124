"""The seeds of an event on their way, and what is told of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

from esper.contracts import Outcome, Stage
from esper.kasmina.evidence.score import Scored
from esper.tolaria.growth.run.account import EventRecord
from esper.tolaria.growth.run.state import RunState
from esper.tolaria.growth.run.telling import decided, decision_of, gated, seen_at_event


class Decision(NamedTuple):
    """What was decided at one place, and what it was said to bring."""

    number: int
    seed: int
    site: str
    gain: float | None
    parameters: int
    flops: int


class Seeds:
    """Moves the seeds of one run's events: evidence first, so there is no incubation and no α.

    Args:
        run: What the run knows of itself.
    """

    def __init__(self, run: RunState) -> None:
        self.run = run

    def end(self, decision: Decision, kept: bool, reason: str) -> None:
        """Move a seed to its end and tell the outcome."""
        seed, site = decision.seed, decision.site
        stage = self.run.morphable.layout.stage_of(seed)
        if kept:
            self.move(seed, site, stage, Stage.EVALUATING, "the event is judged")
            self.move(seed, site, Stage.EVALUATING, Stage.FOSSILISED, reason)
            self.move(seed, site, Stage.FOSSILISED, Stage.DORMANT, "")
        else:
            self.move(seed, site, stage, Stage.ROLLED_BACK, reason)
            self.move(seed, site, Stage.ROLLED_BACK, Stage.CULLED, reason)
            self.move(seed, site, Stage.CULLED, Stage.EMBARGOED, "")
            self.move(seed, site, Stage.EMBARGOED, Stage.DORMANT, "the next event may ask again")
        brought = (decision.gain, decision.parameters, decision.flops) if kept else (None, 0, 0)
        outcome = Outcome(decision.number, site, kept, *brought, 0, reason)
        self.run.tell("outcome", **asdict(outcome))

    def germinate(self, site: str) -> int:
        """Wake a seed of a site."""
        model = self.run.morphable
        seed = next(s for s in model.seeds(site) if model.layout.stage_of(s) is Stage.DORMANT)
        self.move(seed, site, Stage.DORMANT, Stage.GERMINATED, "held-out evidence")
        return seed

    def move(self, seed: int, site: str, source: Stage, target: Stage, reason: str) -> None:
        """Move a seed on and tell."""
        run = self.run
        run.morphable.layout.move(seed, source, target, run.steps)
        run.orchestrator.note_move(seed, target)
        run.tell("stage", seed=seed, site=site, source=source.name, target=target.name, reason=reason)
        run.orchestrator.guard.moved(site, target, run.steps)

    def tell_survey(self, record: EventRecord, scored: Mapping[str, Scored]) -> None:
        """Tell what an event saw."""
        sites = seen_at_event(record, {name: one.report for name, one in scored.items()})
        self.run.tell("survey", decision=self.run.tamiyo.decisions + 1, sites=sites)

    def tell_decision(self, record: EventRecord, look: int, site: str | None, width: int, reason: str) -> int:
        """Number a decision and tell it, with the evidence behind it."""
        run = self.run
        run.tamiyo.decisions += 1
        number: int = run.tamiyo.decisions
        run.tell("decision", **decided(decision_of(record, number, site, width, reason)))
        for one in record.looked:
            if site in (None, one.site) and one.threshold is not None:
                run.tell("gate", **gated(number, one, record.examples, look))
        return number
