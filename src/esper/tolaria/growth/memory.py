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
from esper.kasmina.race.holding import weakly
from esper.kasmina.race.initialisers import Survey
from esper.kasmina.race.race import Race, RaceState
from esper.kasmina.race.trial import Trial
from esper.kasmina.seeds.layer import KasminaLayer
from esper.kasmina.widths.layers import weight_of
from esper.kasmina.widths.pairs import Pair
from esper.saving.genome import plan_from
from esper.surgery.isolation.contexts import same_randomness
from esper.tolaria.governor import GovernorHooks
from esper.tolaria.growth.early.early import Early
from esper.tolaria.growth.early.state import RecipeState
from esper.tolaria.growth.run.state import RunState

VERSION = 2


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
    trial: TrialState | None


def capture(run: RunState, early: Early | None, watch: GovernorHooks | None) -> GrowthState:
    """Return the state of a run: tensors, numbers, strings and containers of them."""
    parts, orchestrator = run.parts, run.orchestrator
    return {
        "version": VERSION,
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
        "trial": None if orchestrator.trial is None else capture_trial(orchestrator.trial),
    }


def capture_trial(trial: Trial) -> TrialState:
    """Return one trial's state."""
    return {
        "decision": asdict(trial.decision),
        "seed": trial.seed,
        "started": trial.started,
        "before": list(trial.before),
        "after": list(trial.after),
        "ending": trial.ending,
        "waiting": trial.waiting,
        "spent": trial.spent,
        "size": list(trial.size),
        "verdict": None if trial.verdict is None else asdict(trial.verdict),
        "race": None if trial.race is None else trial.race.state_dict(),
        "kernel": None
        if trial.kernel is None
        else {k: v.detach().clone() for k, v in trial.kernel.state_dict().items()},
        "optimizer": None if trial.optimizer is None else copy.deepcopy(trial.optimizer.state_dict()),
        "sampling": trial.layer.sampling,
        "tapped": None if trial.kernel is None else trial.tap.x,  # what an exposed kernel is examined with
    }


def restore(
    run: RunState, given: Mapping[str, object], early: Early | None, watch: GovernorHooks | None
) -> None:
    """Bring a fresh run to a saved state: topology first, then everything by name.

    Raises:
        StateError: Another version, or the state of another model.
    """
    if given.get("version") != VERSION:
        raise StateError(
            f"the state has version {given.get('version')!r}; this Esper reads version {VERSION}"
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
    if state["trial"] is not None:
        restore_trial(run, state["trial"])


def restore_trial(run: RunState, state: TrialState) -> None:
    """Wake the seed that was awake."""
    facts: dict[str, Any] = {**state["decision"], "arms": tuple(state["decision"]["arms"])}
    decision = Decision(**facts)
    orchestrator, morphable = run.orchestrator, run.morphable
    assert decision.site is not None
    layer = morphable.layer(decision.site, weakly(orchestrator.fault))
    trial = Trial(
        decision,
        state["seed"],
        layer,
        state["started"],
        before=list(state["before"]),
        after=list(state["after"]),
        ending=state["ending"],
        waiting=state.get("waiting", False),
        spent=state["spent"],
        size=(state["size"][0], state["size"][1]),
    )
    trial.verdict = None if state["verdict"] is None else Verdict(**state["verdict"])
    orchestrator.trial = trial
    with same_randomness(0):
        if state["race"] is not None:
            trial.race = revived(layer, state["race"], orchestrator.given.peers)
            layer.tap = trial.tap
        if state["kernel"] is not None and state["optimizer"] is not None:
            trial.kernel = layer.kernel = layer.place.kernel(decision.width).train()
            trial.kernel.load_state_dict(state["kernel"])
            trial.optimizer = orchestrator.given.donor.like(trial.kernel, layer.place)
            trial.optimizer.load_state_dict(state["optimizer"])
            layer.alpha = morphable.layout.alpha[trial.seed]
            trial.tap.x = state.get("tapped")
            layer.open()
            layer.sampling = state.get("sampling", False)  # whether the next pass tells vitals
            layer.exposed = bool(layer.alpha > 0) and morphable.layout.stage_of(trial.seed) is not Stage.ERROR


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
