"""``esper.plan``: what a run could grow, without growing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal

from torch import nn

from esper.arguments import whole
from esper.config import ConfigLike, load_config
from esper.kasmina.morphable import wrap
from esper.kasmina.sites.sites import Sites
from esper.kasmina.summary import Summary, summary
from esper.tamiyo.early import POINTS, due
from esper.tamiyo.triggers import Trigger
from esper.tolaria.growth.assembly import widenings
from esper.tolaria.growth.opening.entrance import refuse_host
from esper.tolaria.growth.run.budget import limits, merged_budget
from esper.tolaria.growth.run.recipe import is_raced, recipe_of, with_growth

MOST_STEPS = 10**8  # of a run


def plan(
    model: nn.Module,
    example_inputs: object,
    *,
    steps: int | None = None,
    sites: Sites = "auto",
    budget: Mapping[str, object] | None = None,
    growth: Literal["auto", "early", "incubate", "off"] | None = None,
    config: ConfigLike = None,
) -> Summary:
    """Say where a model could grow, when decisions would fall and how far the budget reaches; a dry run.

    Args:
        model: The host; untouched.
        example_inputs: What it is called with, see ``esper.wrap``.
        steps: Optimizer steps of the run; decisions are placed as under a constant learning rate.
        sites: Where to grow.
        budget: Overrides of the settings' budget, see ``esper.grow``.
        growth: How, in place of what the settings say.
        config: Settings.

    Raises:
        EsperError: Whatever is given does not fit; the model is untouched.
    """
    refuse_host(model)
    whole("steps", steps, least=1, most=MOST_STEPS, none=True)
    settings = with_growth(load_config(config), growth)
    raced = is_raced(settings.growth, model)
    deepen = settings.growth in ("auto", "early")
    wrapped = wrap(
        model, example_inputs, sites=sites, blueprints=settings.blueprints, raced=raced, deepen=deepen
    )
    made = summary(wrapped)
    merged = merged_budget(budget, settings.budget, made.parameters, made.flops)
    made.growth = recipe_of(settings.growth, wrapped)
    if made.growth == "incubate":
        made.decisions = Trigger(
            settings.schedule, steps, min(merged.raced_events, widenings(wrapped, merged))
        ).due
    elif made.growth == "early" and steps is not None:
        made.decisions = due(settings.early.shares, [1.0] * min(steps, POINTS), steps)
    most = limits(merged, made.parameters, made.flops)
    made.limits = asdict(most)
    for row in made.sites:
        rooms = [(most.parameters - made.parameters) // row["unit_parameters"]]
        if most.flops is not None and row["unit_flops"]:
            rooms.append((most.flops - made.flops) // row["unit_flops"])
        made.room[row["name"]] = int(min(rooms))
    return made
