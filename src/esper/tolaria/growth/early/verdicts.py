"""Which places have evidence enough to grow."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import nn

from esper.kasmina.evidence.growth_cost import GrowthCost
from esper.kasmina.widths.places import Place
from esper.saving.ruled import Ties
from esper.tolaria.growth.evidence.evidence import Found
from esper.tolaria.growth.run.account import Looked

NOTHING = 1e-5  # of the best place's gain: a smaller one may be certain, and is not worth a unit
WITH_OTHERS = 0.5  # p-value up to which a place grows with the others: its own gain is not negative


def looked_at(
    found: Found,
    free: Mapping[str, Place],
    units: Mapping[str, int],
    share: float,
    host: nn.Module,
    groups: Ties = (),
) -> list[Looked]:
    """Judge every place; one without a reason against it may grow.

    A place passes by its own evidence; or all together pass, and it does not speak against it. The event's
    part of the false-keep budget is halved between both ways.

    Args:
        found: What was measured.
        free: The places.
        units: That were tested, by place.
        share: Of the false-keep budget, for this event.
        host: The model.
        groups: Places that grow together or not at all.
    """
    alone = share if len(units) == 1 else share / 2 / len(units)
    together = joint(found, units)
    carried = together is not None and together <= share / 2
    cost = GrowthCost(host, {name: free[name] for name in units})
    best = max((scored.gain or 0.0 for scored in found.scored.values()), default=0.0)
    looked: list[Looked] = []
    for name, count in units.items():
        parameters, flops = cost({name: count})
        one = Looked(name, free[name].site.width, count, None, alone, None, parameters, flops)
        looked.append(one)
        scored = found.scored.get(name)
        if scored is None or not len(scored.values):
            failed = found.failed.get(name)
            one.reason = "not passed by these examples" if failed is None else f"units do not run: {failed}"
            continue
        one.p_value, one.gain = found.p_value(scored.values), scored.gain
        if scored.gain is not None and 0.0 <= scored.gain < NOTHING * best:
            one.reason = f"its gain is nothing beside {best:.3g}, the best place's"
        elif one.p_value is None:
            one.reason = (
                f"{len(scored.values)} held-out values cannot be judged: too few, all alike or not finite"
            )
        elif scored.gain is not None and scored.gain < 0.0:
            one.reason = "held-out examples speak against it"
        elif one.p_value > (max(alone, WITH_OTHERS) if carried else alone):
            one.reason = "the held-out gain may be chance"
        elif one.p_value > alone:
            one.together = together
    by_name = {one.site: one for one in looked}
    for group in groups:
        as_one(found, [by_name[name] for name in sorted(group & by_name.keys())], alone)
    return looked


def as_one(found: Found, members: list[Looked], alone: float) -> None:
    """Judge places that grow together or not at all by what they bring together, where not all pass.

    They may spend what each of them may.
    """
    if not any(one.reason for one in members):
        return
    run = all(one.p_value is not None for one in members)
    together = joint(found, {one.site: one.units for one in members}) if run else None
    passed = together is not None and together <= alone * len(members)
    for one in members:
        if passed:
            one.together, one.reason = together, ""
        elif not one.reason:
            one.reason = f"the config gives {len(members)} places one size, and not all have evidence"


def joint(found: Found, units: Mapping[str, int]) -> float | None:
    """Return the p-value of all places together, each counted in its own standard deviations."""
    values = [found.scored[name].values for name in units if name in found.scored]
    longest = max((len(one) for one in values), default=0)
    scaled = [one / one.std() for one in values if len(one) == longest and one.std() > 0]
    return found.p_value(np.sum(scaled, axis=0)) if len(scaled) > 1 else None
