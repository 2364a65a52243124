"""What a run's events say; :data:`esper.contracts.EVENT_FIELDS` lists the fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from esper.contracts import ArmFacts, Decision, HealthReport, WidenPlan
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.survey import Measured
from esper.saving.genome import Plan
from esper.tolaria.growth.run.account import EventRecord, Looked
from esper.tolaria.growth.run.components import RunComponents
from esper.tolaria.growth.run.recipe import Recipe


def started(parts: RunComponents, recipe: Recipe) -> dict[str, object]:
    """Describe the run as it begins, or goes on."""
    facts = ("name", "kind", "blueprint", "width", "between", "unit_parameters", "unit_flops")
    sites = [{fact: getattr(place.site, fact) for fact in facts} for place in parts.model.places.values()]
    return {
        "model": type(parts.model.host).__name__,
        "parameters": parts.host_parameters,
        "flops": parts.model.flops,
        "sites": [{**site, "between": list(site["between"])} for site in sites],
        "refused": [[refusal.place, refusal.reason] for refusal in parts.model.refusals],
        "budget": parts.budget.model_dump(),
        "limits": asdict(parts.limits),
        "growth": recipe,
        "seed": parts.seed,
        "steps": parts.steps,
    }


def size_and_cost(parts: RunComponents) -> dict[str, object]:
    """Return the model's parameters and the FLOPs spent so far."""
    return {
        "parameters": parts.model.parameter_count(),
        "growth_flops": parts.ledger.growth_flops,
        "training_flops": parts.ledger.training_flops,
    }


def surveyed(measured: Mapping[str, Measured], model: MorphableModel) -> list[dict[str, object]]:
    """List what a survey found at each site."""
    return [
        {
            "site": name,
            "improvement": found.report.improvement,
            "unit_flops": model.places[name].site.unit_flops,
            "width": model.places[name].site.width,
            "dead": found.report.dead,
            "gradient_norm": found.report.gradient_norm,
            "examples": found.report.examples,
        }
        for name, found in measured.items()
    ]


def decided(decision: Decision) -> dict[str, object]:
    """Describe a decision and the arms it was chosen from."""
    return {
        "decision": decision.id,
        "action": decision.action,
        "site": decision.site,
        "width": decision.width,
        "start": decision.start,
        "reason": decision.reason,
        "arms": [dict(arm) for arm in decision.arms],
        "propensity": decision.propensity,
        "predicted": decision.predicted,
    }


def seen_at_event(record: EventRecord, reports: Mapping[str, HealthReport]) -> list[dict[str, object]]:
    """List what an early event saw at each place."""
    return [
        {
            "site": one.site,
            "improvement": one.gain,
            "unit_flops": one.flops // one.units if one.units else None,  # one that waits was not priced
            "width": one.width,
            "dead": reports[one.site].dead if one.site in reports else None,
            "gradient_norm": reports[one.site].gradient_norm if one.site in reports else None,
            "examples": record.examples,
        }
        for one in record.looked
    ]


def decision_of(record: EventRecord, number: int, site: str | None, width: int, reason: str) -> Decision:
    """Write an early event's decision about one place, or about nothing, as every decision is written."""
    at = next((one for one in record.looked if one.site == site), None)
    gain = None if at is None else at.gain
    predicted = None if at is None or gain is None or not at.flops else gain / at.flops
    arms = tuple(ArmFacts(site=one.site, width=one.units, score=one.gain) for one in record.looked)
    facts = site, width, None if site is None else "scored", reason, 1.0, predicted, arms
    return Decision(number, record.step, "nothing" if site is None else "widen", *facts)


def gated(decision: int, one: Looked, examples: int, look: int) -> dict[str, object]:
    """Describe a place's evidence; an e-value of 1/p is what a p-value is worth at most."""
    assert one.threshold is not None
    return {
        "decision": decision,
        "site": one.site,
        "look": look,
        "e_value": None if one.p_value is None else 1 / one.p_value,
        "threshold": 1 / one.threshold,
        "p_value": one.p_value,
        "needed": one.threshold,
        "gain": one.gain,
        "examples": examples,
        "passed": not one.reason,
        "reason": one.reason or "held-out evidence",
    }


def widened(plans: Sequence[Plan], decision: int, site: str, parameters: int) -> dict[str, object]:
    """Describe what became wider at an early event; the output did not move."""
    plan = next(p for p in reversed(plans) if isinstance(p, WidenPlan) and p.site == site)
    return {
        "decision": decision,
        "site": site,
        "units": plan.units,
        "edits": [[e.name, e.axis, e.old, e.new] for e in plan.edits],
        "parameters": parameters,
        "difference": 0.0,
        "milliseconds": None,
    }
