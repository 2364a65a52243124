"""``esper.plan``: what a run could grow, without growing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from esper.config import ConfigLike, load_config
from esper.kasmina.morphable import wrap
from esper.kasmina.sites import Sites
from esper.kasmina.summary import Summary, summary
from esper.tamiyo.triggers import Trigger
from esper.tolaria.growth.assembly import limit, widenings
from esper.tolaria.growth.entrance import merged_budget, refuse_host


def plan(
    model: nn.Module,
    example_inputs: Any,
    *,
    steps: int | None = None,
    sites: Sites = "auto",
    budget: Mapping[str, Any] | None = None,
    config: ConfigLike = None,
) -> Summary:
    """Say where a model could grow, when decisions would fall and how far the budget reaches; a dry run.

    Args:
        model: The host; untouched.
        example_inputs: What it is called with, see ``esper.wrap``.
        steps: Optimizer steps of the run.
        sites: Where to grow.
        budget: Overrides of the settings' budget.
        config: Settings.
    """
    refuse_host(model)
    settings = load_config(config)
    merged = merged_budget(budget, settings.budget)
    wrapped = wrap(model, example_inputs, sites=sites, blueprints=settings.blueprints)
    made = summary(wrapped)
    made.decisions = Trigger(
        settings.schedule, steps, min(merged.growth_events, widenings(wrapped, merged))
    ).due
    most = limit(merged, made.parameters)
    made.room = {row["name"]: int((most - made.parameters) // row["unit_parameters"]) for row in made.sites}
    return made
