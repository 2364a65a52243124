"""Wire the rooms together for one run: the only place that picks implementations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from esper.batches.cropped import trials
from esper.batches.examples import LossFunction, PerExample, count_examples
from esper.batches.heldout import first
from esper.batches.joins import Joins
from esper.config import Budget, Config
from esper.contracts import Event, Observer
from esper.distributed.collectives import Peers, digest
from esper.distributed.model_wrapper import Wrapping
from esper.errors import ProcessError
from esper.kasmina.evidence.coupling import ASKED
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.gate import Gate
from esper.kasmina.race.needs import Services, Unforged, Unscaled
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.race.own_optimizers import OwnOptimizers
from esper.kasmina.race.schedule import Timing
from esper.kasmina.race.worth import ALONE_EACH, Worth, counted, worth_of
from esper.kasmina.recording.flops import Ledger
from esper.kasmina.seeds.compiling import CompilePolicy, detect, refuse_unseen_seeds
from esper.kasmina.sites.sites import Sites
from esper.kasmina.widths.layers import features
from esper.surgery.isolation.contexts import examining, same_randomness
from esper.surgery.optimizers.adoption import refuse_homeless
from esper.surgery.optimizers.inner import with_wrappers
from esper.tamiyo.controller import Tamiyo
from esper.tolaria.growth.evidence.held import refuse_not_finite
from esper.tolaria.growth.opening.arguments import averages
from esper.tolaria.growth.opening.entrance import held_out
from esper.tolaria.growth.opening.inner_gradients import Differentiating
from esper.tolaria.growth.opening.opening import Opening, opened
from esper.tolaria.growth.opening.optimizers import by_name, named_optimizers
from esper.tolaria.growth.opening.request import Request
from esper.tolaria.growth.run.budget import limits, merged_budget
from esper.tolaria.growth.run.commit import Committer
from esper.tolaria.growth.run.components import Passes, RunComponents
from esper.tolaria.growth.run.forging import Forging
from esper.tolaria.growth.run.observers import Observers
from esper.tolaria.growth.run.recipe import is_raced, recipe_of
from esper.tolaria.growth.run.streams import Streams

SETTLING = 20  # steps until BatchNorm's running statistics (momentum 0.1) have forgotten 88 %


class Detours:
    """Tells what was done otherwise than planned, at the step the orchestrator has come to."""

    def __init__(self, observe: Observer) -> None:
        self.observe = observe
        self.orchestrator: SeedOrchestrator | None = None

    def __call__(self, what: str, why: str) -> None:
        """Tell one."""
        step = 0 if self.orchestrator is None else self.orchestrator.step
        self.observe(Event("fallback", step, {"what": what, "why": why}))


def assemble(request: Request, wrapping: Wrapping, observe: Observers) -> RunComponents:
    """Check what was given and wire a run; nothing of the user's is changed."""
    policy, peers, config = detect(wrapping.host, request.loss_fn), wrapping.peers, request.config
    host = policy.host
    optimizers = named_optimizers(request.optimizer, host)
    ema = averages(request.ema, host)
    opening, worth = looked_at(request, wrapping, policy, optimizers)
    model, passes = opening.model, Passes(host, opening.loss_fn, opening.batch)
    merged = merged_budget(request.budget, config.budget, model.parameter_count(), model.flops)
    config = config.model_copy(update={"budget": merged})
    model.pool.enabled = config.kernels.streams
    forging, tell = Forging(config.kernels, observe), Detours(observe)
    gate = Gate(host, opening.loss_fn, opening.held, config.gate, looks(model, config), tell, peers, worth)
    followers = with_wrappers(by_name(request.optimizer))
    committer = Committer(model, followers, ema, passes.over_probe, config.new_slot_state, observe, peers)
    streams, ledger, joins = Streams(request.seed), Ledger(peers.world), Joins(apart=not worth.alone)
    services = Services(
        passes=passes,
        gate=gate,
        ledger=ledger,
        observe=observe,
        donor=OwnOptimizers(optimizers, tell),
        committer=committer,
        forging=Unforged() if policy.kind == "whole" else forging,
        streams=streams,
        scaler=Unscaled() if request.scaler is None else request.scaler,
        wrapping=wrapping,
        joins=joins,
        rate=config.race.learning_rate,
    )
    timing = Timing.of(config, request.steps, settling(host))
    orchestrator = tell.orchestrator = SeedOrchestrator(model, config, timing, services)
    refuse_strangers(peers, model, request.seed, request.steps)
    return RunComponents(
        given=request.model,
        wrapping=wrapping,
        model=model,
        optimizers=optimizers,
        orchestrator=orchestrator,
        tamiyo=Tamiyo(config, request.steps, widenings(model, merged)),
        committer=committer,
        ledger=ledger,
        gate=gate,
        forging=forging,
        streams=streams,
        joins=joins,
        config=config,
        budget=merged,
        limits=limits(merged, model.parameter_count(), model.flops),
        observe=observe,
        loss_fn=opening.loss_fn,
        probe=opening.held,
        example=opening.batch if isinstance(request.probe, str) else None,
        per_example=request.per_example,
        axes=request.axes,
        averages=ema,
        schedulers=request.schedulers,
        loss_of=passes.loss_of,
        latency_ms=passes.latency_ms,
        host_parameters=model.parameter_count(),
        host_flops=model.flops,
        steps=request.steps,
        seed=request.seed,
        warnings=[*opening.notes, *cautions(model, config, request.steps, worth)],
    )


def looked_at(
    request: Request, wrapping: Wrapping, policy: CompilePolicy, optimizers: Mapping[str, Optimizer]
) -> tuple[Opening, Worth]:
    """Find the places of a host, and say what is one value of the evidence that a race needs."""
    config, worth = request.config, ALONE_EACH
    with policy.uncompiled(), wrapping.gathered():
        find = partial(morphable, policy.host, policy, request.sites, config)
        held = held_out(request.probe, request.example)
        opening = opened(policy.host, request.loss_fn, request.per_example, held, find, request.axes)
        refuse_branches(opening.model, optimizers)
        if recipe_of(config.growth, opening.model) == "incubate":
            refuse_unseen_seeds(policy)
            worth = raced_worth(opening.model, opening, request.per_example)
    return opening, worth


def settling(host: nn.Module) -> int:
    """Return the steps until a host's running statistics have settled."""
    norms = (module for module in host.modules() if isinstance(module, _NormBase))
    return SETTLING if any(norm.track_running_stats for norm in norms) else 0


def cautions(model: MorphableModel, config: Config, steps: int | None, worth: Worth) -> list[str]:
    """Say at the start what makes a run slower, worse or less repeatable than it could be."""
    found = []
    if steps is None:
        found.append(
            "steps is not given: growth waits for the loss to stall, "
            "which measured worse than an even schedule; pass steps="
        )
    if config.budget.wall_seconds is not None or config.budget.latency_ms is not None:
        found.append(
            "a budget in seconds makes decisions depend on the clock; runs with the same seed may differ"
        )
    if config.growth == "early" and not model.pairs and not model.stacks:
        found.append(
            "nothing will grow: growth='early' widens layers and adds blocks, and this model has no place "
            "for either; growth='incubate' races branches beside its layers"
        )
    if config.growth == "auto" and recipe_of("auto", model) == "incubate":
        found.append(
            "branches are raced, since nothing can be widened or most of the model is frozen: runs took up "
            "to twice as long, and what is kept stays beside your layers; growth='off' trains it as it is"
        )
    if worth.why:
        found.append(f"held-out evidence is of batches as they come, each one value: {worth.why}")
    elif not worth.told:
        found.append(
            "held-out evidence is of batches, each one value: it cannot be told whether the loss couples "
            "their examples, as where experts get some rows of a batch; pass per_example= if it does not"
        )
    return found


def morphable(
    host: nn.Module, policy: CompilePolicy, sites: Sites, config: Config, loss_fn: LossFunction, batch: object
) -> MorphableModel:
    """Find the places of a host by a batch."""
    few, others = ([of(loss_fn, one) for one in some] for some in trials(batch, features(host)))
    return MorphableModel(
        host,
        of(loss_fn, batch),
        count_examples(batch),
        sites,
        blueprints=config.blueprints,
        policy=policy,
        smoothing=config.telemetry.smoothing,
        sampling=config.telemetry.sampling,
        deepen=config.growth in ("auto", "early"),
        raced=is_raced(config.growth, host),
        trials=(few, others),
    )


def raced_worth(model: MorphableModel, opening: Opening, per_example: PerExample | None) -> Worth:
    """Say what is one value of the evidence that a race needs."""
    if per_example is not None:
        inner = isinstance(opening.loss_fn, Differentiating)
        graphs = opening.loss_fn.graphs if isinstance(opening.loss_fn, Differentiating) else ()
        return Worth(alone=True, per_example=Differentiating(per_example, graphs) if inner else per_example)
    held = first(opening.held, ASKED)
    with examining(model.host, 0):
        losses = [float(opening.loss_fn(model.host, batch)) for batch in counted(held)]
    refuse_not_finite({f"batch {i} of the probe": loss for i, loss in enumerate(losses)})
    return worth_of(model.host, opening.loss_fn, model.places, held)


def of(loss_fn: LossFunction, batch: object) -> Callable[[nn.Module], Tensor]:
    """Return what takes the loss of a batch."""
    return lambda model: loss_fn(model, batch)


def refuse_strangers(peers: Peers, model: MorphableModel, seed: int, steps: int | None) -> None:
    """Refuse processes that would grow different things.

    Raises:
        ProcessError: With what differs.
    """
    shapes = [(name, tuple(p.shape)) for name, p in model.host.named_parameters()]
    facts = {"model": shapes, "sites": model.names, "seed": seed, "steps": steps}
    found = peers.all_gather_ints([digest(repr(fact)) for fact in facts.values()])
    for name, values in zip(facts, zip(*found, strict=True), strict=True):
        if len(set(values)) > 1:
            raise ProcessError(f"the processes differ in {name}; give esper.grow the same in all of them")


def widenings(model: MorphableModel, budget: Budget) -> int:
    """Count the smallest widenings the parameter budget has room for, at the cheapest site."""
    sites = [place.site for place in model.places.values()]
    smallest = min(site.unit_parameters * site.granularity + site.base_parameters for site in sites)
    host = model.parameter_count()
    return max((limits(budget, host, model.flops).parameters - host) // smallest, 0)


def looks(model: MorphableModel, config: Config) -> int:
    """Share the false-keep budget by half as many looks again as widenings are planned."""
    planned = min(config.budget.raced_events, widenings(model, config.budget))
    return config.gate.looks or max(math.ceil(1.5 * planned), 1)


def refuse_branches(model: MorphableModel, optimizers: Mapping[str, Optimizer]) -> None:
    """Refuse optimizers that could not adopt a branch that may stay.

    Raises:
        OptimizerError: With what to add.
    """
    with same_randomness(0):
        for name, place in model.places.items():
            if place.site.kind != "pair":
                refuse_homeless(optimizers, place.ends(), place.kernel(place.site.granularity), name)
