"""Put the report of a run together."""

from __future__ import annotations

from typing import Any

from torch import nn

from esper.tolaria.growth.run.account import EventRecord, Report, advise
from esper.tolaria.growth.run.mishaps import replaced

INCUBATED = (
    "candidates were raced at one place at a time (growth='incubate'): growth.plans and esper why say more"
)
OTHERWISE = {"incubate": [INCUBATED], "off": ["growth is off"]}
OUTPUT = "the output layer: its width is the task's"


def refusals(growth: Any) -> list[tuple[str, str]]:
    """List the places where nothing can grow, each with the reason in the user's words."""
    outputs: list[nn.Module] = [] if growth.early is None else growth.early.evidence.saturation.outputs
    last = {path for path, module in growth.morphable.host.named_modules() if module in outputs}
    return [
        (refusal.place or "the model", OUTPUT if refusal.place in last else refusal.reason)
        for refusal in growth.morphable.refusals
    ]


def report(growth: Any) -> Report:
    """Return why what grew grew, and why the rest did not."""
    parts, early = growth.parts, growth.early
    events: list[EventRecord] = [] if early is None else early.records
    due = [] if early is None or growth.finished else list(early.timetable.due)
    training, complaint = growth.cost.training_flops, growth.taken.complaint()
    doubts = [complaint] if complaint else [] if early is None else early.doubts
    lost = replaced(parts.committer.replaced)
    advice = (
        advise(events, due, doubts, parts.steps)
        if early is not None
        else [*doubts, *OTHERWISE[growth.recipe]]
    )
    return Report(
        events=events,
        refused=refusals(growth),
        size=(parts.host_parameters, growth.morphable.parameter_count()),
        flops=(parts.host_flops, growth.morphable.flops),
        cost=growth.cost.growth_flops / training if training else None,
        due=due,
        advice=[*([lost] if lost else []), *advice],
    )
