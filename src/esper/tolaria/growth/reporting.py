"""Put the report of a run together."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from esper.contracts import DeepenPlan
from esper.saving.genome import Plan
from esper.tolaria.growth.early.early import Early
from esper.tolaria.growth.early.rates import is_moved
from esper.tolaria.growth.run.account import EventRecord, Report, advise
from esper.tolaria.growth.run.mishaps import replaced
from esper.tolaria.growth.run.state import RunState

INCUBATED = (
    "candidates were raced at one place at a time (growth='incubate'): growth.plans and esper why say more"
)
OTHERWISE = {"incubate": [INCUBATED], "off": ["growth is off"]}
UNREAD = (
    "a scheduler moves the learning rate, and esper.grow was not given it: events fall as under a cosine; "
    "pass it as schedulers="
)
NEVER = "growth.step was never called: call growth.step(batch, loss) behind optimizer.step(), at every step"
OUTPUT = "the output layer: its width is the task's"


def refusals(run: RunState, early: Early | None) -> list[tuple[str, str]]:
    """List the places where nothing can grow, each with the reason in the user's words."""
    outputs: list[nn.Module] = [] if early is None else early.evidence.saturation.outputs
    last = {path for path, module in run.morphable.host.named_modules() if module in outputs}
    return [
        (refusal.place or "the model", OUTPUT if refusal.place in last else refusal.reason)
        for refusal in run.morphable.refusals
    ]


def unread(run: RunState) -> list[str]:
    """Say that events were placed without the scheduler that the optimizer has."""
    optimizer = next(iter(run.parts.optimizers.values()))
    unknown = run.parts.steps is not None and not run.parts.schedulers and is_moved(optimizer)
    return [UNREAD] if unknown else []


def moved(host: nn.Module, plans: Iterable[Plan]) -> list[str]:
    """Say where blocks came before other children of a Sequential: by index these are others now.

    Args:
        host: The model as it is.
        plans: What grew in it.
    """
    new: dict[str, set[str]] = {}
    for plan in plans:
        if isinstance(plan, DeepenPlan):
            new.setdefault(plan.container, set()).add(plan.name)
    lines: list[str] = []
    for path, names in new.items():
        children = list(host.get_submodule(path)._modules)
        before = [name for name in children if name not in names]
        others = [(old, name) for old, name in enumerate(before) if children[old] != name]
        if others:
            old, name = others[0]
            lines.append(
                f"{path or 'the model'}, a Sequential, got {len(names)} more in the middle: what was [{old}] "
                f"is [{children.index(name)}] now, and what follows moved too; its name {name!r} and every "
                "key stay"
            )
    return lines


def report(run: RunState, early: Early | None) -> Report:
    """Return why what grew grew, and why the rest did not."""
    parts = run.parts
    events: list[EventRecord] = [] if early is None else early.records
    due = [] if early is None or run.finished else list(early.timetable.due)
    training, complaint = run.cost.training_flops, run.clock.complaint()
    if run.finished and not run.cost.training_flops:
        complaint = NEVER
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
        advice=[
            *([lost] if lost else []),
            *run.mishaps.unsaid,
            *moved(run.morphable.host, run.plans),
            *advice,
            *(unread(run) if early is not None else []),
        ],
    )
