"""What the conductor's events say; :data:`esper.contracts.EVENT_FIELDS` lists the fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from esper.contracts import Decision
from esper.kasmina.health import Measured
from esper.kasmina.morphable import MorphableModel
from esper.tolaria.growth.assembly import Parts
from esper.tolaria.growth.recipe import Recipe


def started(parts: Parts, recipe: Recipe) -> dict[str, Any]:
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


def size_and_cost(parts: Parts) -> dict[str, Any]:
    """Return the model's parameters and the FLOPs spent so far."""
    return {
        "parameters": parts.model.parameter_count(),
        "growth_flops": parts.ledger.growth_flops,
        "training_flops": parts.ledger.training_flops,
    }


def surveyed(measured: Mapping[str, Measured], model: MorphableModel) -> list[dict[str, Any]]:
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


def decided(decision: Decision) -> dict[str, Any]:
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
