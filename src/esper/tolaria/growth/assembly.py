"""Wire the rooms together for one run: the only place that picks implementations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from esper.batches.cropped import trials
from esper.batches.examples import LossFunction, count_examples
from esper.batches.heldout import first
from esper.batches.joins import Joins
from esper.blueprints.kernel import LiveKernel
from esper.config import Budget, Config
from esper.contracts import Event, Observer
from esper.distributed.collectives import Peers, digest
from esper.distributed.model_wrapper import Wrapping
from esper.errors import ProcessError
from esper.kasmina.evidence.coupling import ASKED
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.gate import Gate
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.race.own_optimizers import OwnOptimizers
from esper.kasmina.race.trial import Given, Timing
from esper.kasmina.race.worth import ALONE_EACH, Worth, worth_of
from esper.kasmina.recording.flops import Ledger
from esper.kasmina.seeds.compiling import CompilePolicy, detect
from esper.kasmina.sites.sites import Sites
from esper.kasmina.widths.layers import features
from esper.surgery.isolation.contexts import examining, same_randomness
from esper.surgery.optimizers.adoption import refuse_homeless
from esper.tamiyo.controller import Tamiyo
from esper.tolaria.growth.opening.arguments import averages
from esper.tolaria.growth.opening.entrance import Differentiating, held_out
from esper.tolaria.growth.opening.opening import Opening, opened
from esper.tolaria.growth.opening.optimizers import named_optimizers
from esper.tolaria.growth.run.budget import limits, merged_budget
from esper.tolaria.growth.run.commit import Committer
from esper.tolaria.growth.run.components import Parts, PerExample
from esper.tolaria.growth.run.forging import Forging
from esper.tolaria.growth.run.recipe import is_raced, recipe_of
from esper.tolaria.growth.run.streams import Streams

SETTLING = 20  # steps until BatchNorm's running statistics (momentum 0.1) have forgotten 88 %


def assemble(
    given_model: nn.Module,
    wrapping: Wrapping,
    optimizer: Optimizer | Mapping[str, Optimizer],
    loss_fn: LossFunction,
    probe: Iterable[Any] | Literal["stream"],
    *,
    example: Any,
    per_example: PerExample | None,
    steps: int | None,
    schedulers: Sequence[Any],
    scaler: Any,
    ema: Sequence[nn.Module] | nn.Module,
    sites: Sites,
    budget: Mapping[str, Any] | None,
    config: Config,
    seed: int,
    observe: Observer,
) -> Parts:
    """Check what was given and wire a run; nothing of the user's is changed."""
    policy, peers = detect(wrapping.host, loss_fn), wrapping.peers
    host = policy.host
    optimizers = named_optimizers(optimizer, host)
    ema = averages(ema, host)
    with policy.uncompiled(), wrapping.gathered():
        find = partial(morphable, host, policy, sites, config)
        opening = opened(host, loss_fn, per_example, held_out(probe, example), find)
        model, loss_fn, held, batch = opening.model, opening.loss_fn, opening.held, opening.batch
        refuse_branches(model, optimizers)
        worth = ALONE_EACH
        if recipe_of(config.growth, model) == "incubate":
            worth = raced_worth(model, opening, per_example)
    merged = merged_budget(budget, config.budget, model.parameter_count(), model.flops)
    config = config.model_copy(update={"budget": merged})
    model.pool.enabled = config.kernels.streams
    streams, ledger, joins = Streams(seed), Ledger(peers.world), Joins(apart=not worth.alone)
    forging = Forging(config.kernels, observe)

    def fallback(what: str, why: str) -> None:
        observe(Event("fallback", orchestrator.step, {"what": what, "why": why}))

    gate = Gate(host, loss_fn, held, config.gate, looks(model, config), fallback, peers, worth)
    committer = Committer(
        model, optimizers, ema, lambda: loss_fn(host, batch), config.new_slot_state, observe, peers
    )
    donor = OwnOptimizers(optimizers, fallback)
    settling = (
        SETTLING if any(isinstance(m, _NormBase) and m.track_running_stats for m in host.modules()) else 0
    )

    def commit(kernel: LiveKernel, own: Optimizer, decision: Any) -> str:
        before = model.places[decision.site].site
        why = committer.commit(kernel, own, decision, orchestrator.step)
        if not why and before.kind == "pair":
            model.flops += before.unit_flops * decision.width
        elif not why:
            model.meter(committer.run)
        return why

    given = Given(
        run=lambda one: loss_fn(host, one),
        gate=gate,
        ledger=ledger,
        observe=observe,
        optimizer=donor.like,
        follow=donor.follow,
        commit=commit,
        forge=forging.file
        if policy.kind != "whole"
        else (lambda *rest: None),  # the host's own graph holds it
        draw=streams.draw,
        rate=config.race.learning_rate,
        scale=(lambda: float(scaler.get_scale())) if scaler is not None else (lambda: 1.0),
        peers=peers,
        whole=wrapping.gathered,
        join=joins,
        deferred=wrapping.deferred,
    )
    orchestrator = SeedOrchestrator(model, config, Timing.of(config, steps, settling), given)
    warnings = []
    if steps is None:
        warnings.append(
            "steps is not given: growth waits for the loss to stall, "
            "which measured worse than an even schedule; pass steps="
        )
    if merged.wall_seconds is not None or merged.latency_ms is not None:
        warnings.append(
            "a budget in seconds makes decisions depend on the clock; runs with the same seed may differ"
        )
    if config.growth == "auto" and recipe_of("auto", model) == "incubate":
        warnings.append(
            "branches are raced, since nothing can be widened or most of the model is frozen: runs took up "
            "to twice as long, and what is kept stays beside your layers; growth='off' trains it as it is"
        )
    refuse_strangers(peers, model, seed, steps)
    return Parts(
        given=given_model,
        wrapping=wrapping,
        model=model,
        optimizers=optimizers,
        orchestrator=orchestrator,
        tamiyo=Tamiyo(config, steps, widenings(model, merged)),
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
        loss_fn=loss_fn,
        probe=held,
        example=batch if isinstance(probe, str) else None,
        per_example=per_example,
        averages=ema,
        schedulers=schedulers,
        loss_of=given.run,
        latency_ms=lambda: latency(host, lambda: loss_fn(host, batch)),
        host_parameters=model.parameter_count(),
        host_flops=model.flops,
        steps=steps,
        seed=seed,
        warnings=warnings,
    )


def morphable(
    host: nn.Module, policy: CompilePolicy, sites: Sites, config: Config, loss_fn: LossFunction, batch: Any
) -> MorphableModel:
    """Find the places of a host by a batch."""
    few, others = ([of(loss_fn, one) for one in some] for some in trials(batch, features(host)))
    return MorphableModel(
        host,
        lambda model: loss_fn(model, batch),
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
        return Worth(alone=True, per_example=Differentiating(per_example) if inner else per_example)
    return worth_of(model.host, opening.loss_fn, model.places, first(opening.held, ASKED))


def of(loss_fn: LossFunction, batch: Any) -> Callable[[nn.Module], Tensor]:
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


def latency(model: nn.Module, run: Callable[[], Any]) -> float:
    """Return the median of five passes over a probe batch, in milliseconds."""
    times = []
    with examining(model):
        for _ in range(5):
            begun = time.perf_counter()
            run()
            times.append((time.perf_counter() - begun) * 1e3)
    return sorted(times)[2]
