"""What a run must remember to go on in another process: ``Growth.state_dict`` and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NotRequired, TypedDict, cast

import torch
from torch import Tensor

from esper.contracts import Decision, Stage
from esper.distributed.collectives import Peers
from esper.errors import StateError, nearest
from esper.kasmina.race.gate import Verdict
from esper.kasmina.race.initialisers import Survey
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.race.race import Race, RaceState
from esper.kasmina.race.trial import (
    Baseline,
    Decaying,
    Evaluating,
    Exposed,
    Germinated,
    Grafting,
    Judged,
    Origin,
    Passed,
    Stabilising,
    Training,
    Trial,
    carried,
)
from esper.kasmina.seeds.layer import KasminaLayer, Tap
from esper.kasmina.seeds.state import END
from esper.kasmina.widths.layers import weight_of
from esper.kasmina.widths.pairs import Pair
from esper.saving.genome import plan_from
from esper.surgery.isolation.contexts import same_randomness
from esper.tolaria.governor import GovernorHooks
from esper.tolaria.growth.early.early import Early
from esper.tolaria.growth.early.state import RecipeState
from esper.tolaria.growth.run.state import RunState

ONE = 2  # version of a state where one seed at most may be awake
SEVERAL = 3  # where several may be


class TrialState(TypedDict):
    """A decision that is under way."""

    decision: dict[str, Any]  # the fields of it, as of the verdict
    seed: int
    started: int
    before: list[float]
    after: list[float]
    ending: str
    waiting: NotRequired[bool]
    spent: int
    size: list[int]  # parameters, forward FLOPs per example
    verdict: dict[str, Any] | None
    race: RaceState | None
    kernel: dict[str, Tensor] | None
    optimizer: dict[str, Any] | None
    sampling: NotRequired[bool]
    tapped: NotRequired[Tensor | None]


class GrowthState(TypedDict):
    """A run; ``Any`` is what the room that writes it also reads."""

    version: int
    sites: dict[str, int]  # width by name
    plans: list[dict[str, Any]]
    layout: dict[str, Tensor]
    tamiyo: Any
    streams: dict[str, Mapping[str, object]]
    cost: Any
    flops: int
    looks: int
    block: NotRequired[int | None]
    counters: list[int]
    losses: list[float]
    cool_until: int
    lineage: NotRequired[int]
    asked: str | None
    paused: bool
    pending: list[float]
    batches: list[object]
    governor: NotRequired[Any]
    early: NotRequired[RecipeState | None]
    trial: TrialState | None  # the oldest one
    others: NotRequired[list[TrialState]]  # from version 3 on, like those that follow
    mixed: NotRequired[list[float]]


def capture(run: RunState, early: Early | None, watch: GovernorHooks | None) -> GrowthState:
    """Return the state of a run: tensors, numbers, strings and containers of them."""
    parts, orchestrator = run.parts, run.orchestrator
    state: GrowthState = {
        "version": ONE,
        "sites": {name: pair.site.width for name, pair in run.morphable.places.items()},
        "plans": [asdict(plan) for plan in run.plans],
        "layout": {k: v.clone() for k, v in run.morphable.layout.named_buffers()},
        "tamiyo": run.tamiyo.state_dict(),
        "streams": parts.streams.state_dict(),
        "cost": run.cost.state_dict(),
        "flops": run.morphable.flops,
        "looks": parts.gate.looks,
        "block": parts.gate.size,
        "counters": [run.steps, run.events_kept, parts.epochs, orchestrator.examples],
        "losses": list(orchestrator.losses),
        "cool_until": orchestrator.cool_until,
        "lineage": orchestrator.lineage,
        "asked": run.asked,
        "paused": run.paused,
        "pending": list(run.losses),
        "batches": list(run.batches),
        "governor": None if watch is None else watch.state_dict(),
        "early": None if early is None else early.state_dict(),
        "trial": None,
    }
    first, *others = [*map(capture_trial, orchestrator.trials.values())] or [None]
    state["trial"] = first
    if run.config.schedule.concurrent > 1:  # what reads one seed only must not leave the others out
        state["version"] = SEVERAL
        state["others"] = [other for other in others if other is not None]
        state["mixed"] = list(orchestrator.mixed)
    return state


def capture_trial(trial: Trial) -> TrialState:
    """Return one trial's state."""
    origin, baseline = trial.origin, trial.origin.baseline
    exposed = trial if isinstance(trial, Exposed) else None
    won = trial if isinstance(trial, Judged | Exposed) else None
    return {
        "decision": asdict(origin.decision),
        "seed": origin.seed,
        "started": trial.started,
        "before": [] if exposed is None else list(exposed.before),
        "after": [] if exposed is None else list(exposed.losses),
        "ending": trial.ending if isinstance(trial, Decaying) else "",
        "waiting": isinstance(trial, Passed),
        "spent": baseline.spent,
        "size": [baseline.parameters, baseline.flops],
        "verdict": None if won is None else asdict(won.verdict),
        "race": trial.race.state_dict() if isinstance(trial, Training) else None,
        "kernel": None
        if won is None
        else {k: v.detach().clone() for k, v in won.kernel.state_dict().items()},
        "optimizer": None if exposed is None else copy.deepcopy(exposed.optimizer.state_dict()),
        "sampling": origin.layer.sampling,
        "tapped": None if won is None else won.tap.x,  # what an exposed kernel is examined with
    }


def restore(
    run: RunState, given: Mapping[str, object], early: Early | None, watch: GovernorHooks | None
) -> None:
    """Bring a fresh run to a saved state: topology first, then everything by name.

    Raises:
        StateError: Another version, or the state of another model.
    """
    if given.get("version") not in (ONE, SEVERAL):
        raise StateError(
            f"the state has version {given.get('version')!r}; this Esper reads versions {ONE} and {SEVERAL}"
        )
    state = cast("GrowthState", given)  # of this version
    places = run.morphable.places
    for name in state["sites"]:
        if name not in places:
            raise StateError(
                f"the state knows the site {name!r}, this model does not; {nearest(name, places)}"
            )
    parts, orchestrator = run.parts, run.orchestrator
    for plan in state["plans"]:
        parts.committer.replay(plan_from(plan))
    for name, tensor in state["layout"].items():
        getattr(run.morphable.layout, name).copy_(tensor)
    run.tamiyo.load_state_dict(state["tamiyo"])
    parts.streams.load_state_dict(state["streams"])
    run.cost.load_state_dict(state["cost"])
    run.morphable.flops, parts.gate.looks = state["flops"], state["looks"]
    parts.gate.size = state.get("block")
    run.steps, run.events_kept, parts.epochs, orchestrator.examples = state["counters"]
    run.clock.count = run.steps
    orchestrator.losses.extend(state["losses"])
    orchestrator.step = run.steps
    orchestrator.cool_until, orchestrator.lineage = state["cool_until"], state.get("lineage", 0)
    run.asked, run.paused = state["asked"], state["paused"]
    run.losses.extend(state["pending"])
    run.batches.extend(state["batches"])
    if watch is not None:
        watch.snapshots.clear()  # the model is another one by now
        if state.get("governor") is not None:
            watch.load_state_dict(state["governor"])
    if (state.get("early") is None) != (early is None):
        raise StateError(
            f"the state is of a run that grew by another recipe; this one grows by {run.recipe!r}: pass "
            "growth= as it was"
        )
    if early is not None and state["early"] is not None:
        early.load_state_dict(state["early"])
    orchestrator.mixed.extend(state.get("mixed", ()))
    for trial in (state["trial"], *state.get("others", ())):
        if trial is not None:
            restore_trial(run, trial)


def restore_trial(run: RunState, state: TrialState) -> None:
    """Wake a seed that was awake."""
    facts: dict[str, Any] = {**state["decision"], "arms": tuple(state["decision"]["arms"])}
    decision, seed = Decision(**facts), state["seed"]
    orchestrator, morphable = run.orchestrator, run.morphable
    site = morphable.site_of(seed)
    slot = seed - morphable.seeds(site)[0]
    baseline = Baseline(state["spent"], state["size"][0], state["size"][1])
    origin = Origin(decision, site, slot, seed, orchestrator.wake(site, slot), baseline)
    with same_randomness(0):
        trial = orchestrator.put(phase_of(origin, state, orchestrator))
    if isinstance(trial, Grafting | Decaying) and float(morphable.layout.alpha[seed]) < 1 - END:
        orchestrator.ramp(trial)  # states of 2026-11-27 and before know α, and not its way


def phase_of(origin: Origin, state: TrialState, orchestrator: SeedOrchestrator) -> Trial:
    """Return a trial as far as it had come, by what is known of it."""
    layer, started, services = origin.layer, state["started"], orchestrator.services
    if state["race"] is not None:
        race = revived(layer, state["race"], services.peers)
        trial = Training(origin, started, Tap(), race)
        layer.tap = trial.tap
        return trial
    if state["kernel"] is None or state["verdict"] is None:
        return Germinated(origin, started)
    kernel = layer.place.kernel(origin.decision.width).train()
    kernel.load_state_dict(state["kernel"])
    won = Judged(origin, started, Tap(x=state.get("tapped")), kernel, Verdict(**state["verdict"]))
    if state["optimizer"] is None:
        return won
    optimizer = services.donor.like(kernel, layer.place)
    optimizer.load_state_dict(state["optimizer"])
    layout, layer.kernel = orchestrator.model.layout, kernel
    stage = layout.stage_of(origin.seed)
    layer.alpha = layout.alpha[origin.seed]
    layer.open()
    layer.sampling = state.get("sampling", False)  # whether the next pass tells vitals
    layer.exposed = bool(layer.alpha > 0) and stage is not Stage.ERROR
    return exposed_phase(won.grafting(optimizer, list(state["before"])), state, stage)


def exposed_phase(grafting: Grafting, state: TrialState, stage: Stage) -> Exposed:
    """Return the phase an exposed kernel had come to; one that is to be culled next goes by its losses."""
    after, held = list(state["after"]), carried(grafting)
    if state["ending"]:
        return Decaying(*held, after, state["ending"])
    if state.get("waiting", False):
        return Passed(*held, after)
    if stage is Stage.EVALUATING or after:
        return Evaluating(*held, after)
    return Stabilising(*held) if stage is Stage.STABILISING else grafting


def revived(layer: KasminaLayer, state: RaceState, peers: Peers) -> Race:
    """Build a race of the saved shape and fill it."""
    x = torch.empty(0)
    if isinstance(layer.place, Pair):  # its biases are centred on inputs, if only to be written over
        weight = weight_of(layer.place.producer)
        x = weight.new_zeros(1, *weight.shape[1:2], *[max(weight.shape[2:], default=1)] * (weight.dim() - 2))
    empty = Survey({}, torch.zeros(1), 0)
    race = Race(layer, state["units"], ("random",) * len(state["starts"]), empty, x, 1.0, peers)
    race.starts = tuple(state["starts"])
    race.load_state_dict(state)
    return race
