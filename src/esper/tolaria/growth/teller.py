"""Tells what the early recipe does: moves seeds, numbers decisions, writes points of the curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from esper.contracts import Outcome, Stage
from esper.kasmina.score import Scored
from esper.kasmina.significance import Spending
from esper.tolaria.growth.account import EventRecord, Point
from esper.tolaria.growth.telling import decided, decision_of, gated, seen_at_event


class Teller:
    """The part of the early recipe that speaks."""

    growth: Any
    spending: Spending
    points: list[Point]

    def end(
        self, decision: int, seed: int, site: str, kept: tuple[float | None, int, int] | None, reason: str
    ) -> None:
        """Move a seed to its end and tell the outcome."""
        stage = self.growth.morphable.layout.stage_of(seed)
        if kept is not None:
            self.move(seed, site, stage, Stage.EVALUATING, "the event is judged")
            self.move(seed, site, Stage.EVALUATING, Stage.FOSSILISED, reason)
            self.move(seed, site, Stage.FOSSILISED, Stage.DORMANT, "")
        else:
            self.move(seed, site, stage, Stage.ROLLED_BACK, reason)
            self.move(seed, site, Stage.ROLLED_BACK, Stage.CULLED, reason)
            self.move(seed, site, Stage.CULLED, Stage.EMBARGOED, "")
            self.move(seed, site, Stage.EMBARGOED, Stage.DORMANT, "the next event may ask again")
        gain, parameters, flops = kept or (None, 0, 0)
        outcome = Outcome(decision, site, kept is not None, gain, parameters, flops, 0, reason)
        self.growth.tell("outcome", **asdict(outcome))

    def germinate(self, site: str) -> int:
        """Wake a seed of a site."""
        model = self.growth.morphable
        seed = next(s for s in model.seeds(site) if model.layout.stage_of(s) is Stage.DORMANT)
        self.move(seed, site, Stage.DORMANT, Stage.GERMINATED, "held-out evidence")
        return seed

    def move(self, seed: int, site: str, source: Stage, target: Stage, reason: str) -> None:
        """Move a seed on and tell."""
        growth = self.growth
        growth.morphable.layout.move(seed, source, target, growth.steps)
        growth.orchestrator.note_move(seed, target)
        growth.tell("stage", seed=seed, site=site, source=source.name, target=target.name, reason=reason)

    def tell_survey(self, record: EventRecord, scored: Mapping[str, Scored]) -> None:
        """Tell what an event saw."""
        sites = seen_at_event(record, {name: one.report for name, one in scored.items()})
        self.growth.tell("survey", decision=self.growth.tamiyo.decisions + 1, sites=sites)

    def tell_decision(self, record: EventRecord, site: str | None, width: int, reason: str) -> int:
        """Number a decision and tell it, with the evidence behind it."""
        growth = self.growth
        growth.tamiyo.decisions += 1
        number: int = growth.tamiyo.decisions
        growth.tell("decision", **decided(decision_of(record, number, site, width, reason)))
        for one in record.looked:
            if site in (None, one.site) and one.threshold is not None:
                growth.tell("gate", **gated(number, one, record.examples, len(self.spending.looks)))
        return number

    def note_point(self, held_out: float | None) -> None:
        """Write a point of the curve."""
        growth = self.growth
        spent = growth.cost.training_flops + growth.cost.growth_flops
        size = growth.morphable.parameter_count()
        self.points.append(
            Point(growth.steps, size, growth.morphable.flops, spent, held_out, dict(growth.metrics))
        )
