"""Put the report of a run together."""

from __future__ import annotations

from torch import nn

from esper.tolaria.growth.early.early import Early
from esper.tolaria.growth.run.account import EventRecord, Report, advise
from esper.tolaria.growth.run.mishaps import replaced
from esper.tolaria.growth.run.state import RunState

INCUBATED = (
    "candidates were raced at one place at a time (growth='incubate'): growth.plans and esper why say more"
)
OTHERWISE = {"incubate": [INCUBATED], "off": ["growth is off"]}
OUTPUT = "the output layer: its width is the task's"


def refusals(run: RunState, early: Early | None) -> list[tuple[str, str]]:
    """List the places where nothing can grow, each with the reason in the user's words."""
    outputs: list[nn.Module] = [] if early is None else early.evidence.saturation.outputs
    last = {path for path, module in run.morphable.host.named_modules() if module in outputs}
    return [
        (refusal.place or "the model", OUTPUT if refusal.place in last else refusal.reason)
        for refusal in run.morphable.refusals
    ]


def report(run: RunState, early: Early | None) -> Report:
    """Return why what grew grew, and why the rest did not."""
    parts = run.parts
    events: list[EventRecord] = [] if early is None else early.records
    due = [] if early is None or run.finished else list(early.timetable.due)
    training, complaint = run.cost.training_flops, run.clock.complaint()
    doubts = [complaint] if complaint else [] if early is None else early.doubts
    lost = replaced(parts.committer.replaced)
    advice = (
        advise(events, due, doubts, parts.steps) if early is not None else [*doubts, *OTHERWISE[run.recipe]]
    )
    return Report(
        events=events,
        refused=refusals(run, early),
        size=(parts.host_parameters, run.morphable.parameter_count()),
        flops=(parts.host_flops, run.morphable.flops),
        cost=run.cost.growth_flops / training if training else None,
        due=due,
        advice=[*([lost] if lost else []), *run.mishaps.unsaid, *advice],
    )
