"""``grow``: begin a run that grows."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from esper.batches.axes import Axes, BatchAxis
from esper.batches.examples import LossFunction, PerExample
from esper.config import Config, ConfigLike, load_config
from esper.contracts import Observer, ignore
from esper.distributed.model_wrapper import Wrapping, wrapping_of
from esper.errors import ConfigError
from esper.kasmina.sites.sites import Sites
from esper.log import Logged
from esper.nissa.run.journal import RunJournal
from esper.surgery.isolation.contexts import same_randomness, taught
from esper.surgery.isolation.global_draws import forgetting
from esper.tolaria.governor import GovernorHooks, Settings
from esper.tolaria.growth.assembly import assemble
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.opening.arguments import (
    listed,
    refuse_folder,
    refuse_numbers,
    refuse_scaler,
    refuse_uncallable,
)
from esper.tolaria.growth.opening.entrance import Handing, refuse_host
from esper.tolaria.growth.opening.presence import refuse_growing
from esper.tolaria.growth.opening.request import Request, Restorable, Scaler, Scheduler
from esper.tolaria.growth.run.components import RunComponents
from esper.tolaria.growth.run.observers import Observers
from esper.tolaria.growth.run.recipe import with_growth


def grow(
    model: nn.Module,
    optimizer: Optimizer | Mapping[str, Optimizer],
    loss_fn: LossFunction,
    *,
    probe: Iterable[object] | Literal["stream"],
    example: object = None,
    per_example: PerExample | None = None,
    batch_axis: BatchAxis | None = None,
    steps: int | None = None,
    schedulers: Sequence[Scheduler] | Scheduler | None = (),
    scaler: Scaler | None = None,
    ema: Sequence[nn.Module] | nn.Module | None = (),
    sites: Sites = "auto",
    budget: Mapping[str, object] | None = None,
    growth: Literal["auto", "early", "incubate", "off"] | None = None,
    config: ConfigLike = None,
    run_dir: str | Path | RunJournal | None = None,
    seed: int = 0,
    on_event: Observer = ignore,
) -> Growth:
    """Let a model grow while it trains.

    Args:
        model: Any ``nn.Module`` with at least one pair of Linear or convolution layers that can be widened,
            or what the loop calls in its place: a compiled module, ``DistributedDataParallel`` around it, or
            the module after ``fully_shard``. In several processes every one of them makes the same calls.
        optimizer: The one that trains it, or several by name: any of ``torch.optim``, see docs/optimizers.md.
        loss_fn: ``loss_fn(model, batch) -> scalar``, the same one the loop calls; axis 0 of every tensor of a
            batch is the example axis, unless ``batch_axis`` says otherwise.
        probe: Batches held out of training, re-iterable: the evidence that growth must bring. ``"stream"``
            where the loop sees each example once: the coming batch is evidence before it is learned from.
        example: With ``probe="stream"``, a batch like the loop's, to find the places with.
        per_example: ``per_example(model, batch) -> (examples,)`` losses, where ``loss_fn`` couples examples
            and each of them could be evidence of its own; without it such batches count as one each.
        batch_axis: Axis of the examples in a batch's tensors, 1 where time comes first: (time, batch, …).
            It holds for each tensor that is as long there as the first; others, targets (batch,) say, have
            theirs along axis 0. Or one axis for each part of a batch: ``(1, 0)``, ``{"x": 1, "y": 0}``.
            Without it axis 0 is taken, unless the losses of parts of a batch show it to be 1.
        steps: Optimizer steps of the run; growth is spread over them. Without it only a stall of the loss
            grows.
        schedulers: Learning-rate schedulers in a list, or one; widened parameters stay in their groups, so
            they need no change.
        scaler: A ``GradScaler`` where one is used.
        ema: Averaged copies of the model in a list, or one; they are widened with it.
        sites: Where to grow, see ``esper.wrap``.
        budget: Overrides of the settings' budget. How large the model may become: ``parameters``, a count,
            or ``growth_factor``, a multiple of its own; ``model_flops``, a count of forward FLOPs per
            example, or ``flops_factor``, a multiple; ``latency_ms``. A count holds where both are given.
            What growing may cost: ``growth_events``, ``growth_flops``, ``wall_seconds``.
        growth: How to grow, in place of what the settings say: ``"early"``, in a few events at all places;
            ``"incubate"``, by racing candidates at one place at a time; ``"off"``; ``"auto"``, whichever
            suits the model.
        config: Settings: a ``Config``, a mapping, or a path to a YAML file.
        run_dir: Folder for ``events.jsonl``, or an open journal; of several processes the first writes it.
        seed: Of growth's own random streams.
        on_event: Called with every event. What it raises changes nothing of the run and is raised at the end
            of this call, of ``step`` or of ``finish``, with a note.

    Raises:
        EsperError: Whatever is given does not fit; nothing was changed then.
    """
    refuse_host(model)
    refuse_numbers(steps, seed)
    refuse_uncallable(loss_fn=loss_fn, on_event=on_event)
    if per_example is not None:
        refuse_uncallable(per_example=per_example)
    refuse_scaler(scaler)
    refuse_folder(run_dir)
    axes = Axes(batch_axis)
    movers = listed(schedulers)
    settings = with_growth(load_config(config), growth)
    wrapping = wrapping_of(model, settings.distributed.mode, settings.distributed.deadline)
    if settings.governor.enabled and wrapping.sharded:
        raise ConfigError(
            "governor.enabled watches whole gradients, and each process of a sharded model has a part of "
            "them; leave it off, or wrap the model in DistributedDataParallel"
        )
    request = Request(
        model=model,
        optimizer=optimizer,
        loss_fn=loss_fn,
        probe=probe,
        example=example,
        per_example=None if per_example is None else Handing(per_example, axes),
        steps=steps,
        schedulers=movers,
        scaler=scaler,
        ema=ema,
        sites=sites,
        budget=budget,
        config=settings,
        seed=seed,
        axes=axes,
    )
    journal = journal_of(run_dir, wrapping, settings)
    own: list[Observer] = [] if wrapping.peers.rank else [Logged()]
    observe = Observers(own if journal is None else [journal, *own], on_event)
    try:
        refuse_growing(wrapping.host)
        with taught(), same_randomness():  # a run that grows nothing differs in nothing
            parts = assemble(request, wrapping, observe)
            made = Growth(parts)
    except BaseException:  # whatever ends it, nothing began
        forgetting(wrapping.host)()
        if journal is not None:
            journal.take_back()
        raise
    made.loop.redo.journal = journal
    made.loop.presence.closers.append(forgetting(made.host))
    if settings.governor.enabled:
        govern(made, parts, [*movers, *([scaler] if scaler is not None else [])])
    try:
        observe.settle()
    except Exception:  # the user's own error, of an event at the start
        take_back(made)
        raise
    return made


def take_back(made: Growth) -> None:
    """Leave nothing of a run that began, and could not go on before its first step."""
    _let_go(made)
    if made.journal is not None:
        made.journal.take_back()


def put_down(made: Growth) -> None:
    """Let go of the model, and of everything a run holds, in the middle of it: another process may go on."""
    _let_go(made)
    if made.journal is not None:
        made.journal.close()


def _let_go(made: Growth) -> None:
    made.leave()
    if made.loop.watch is not None:
        made.loop.watch.close()
    made.run.parts.forging.close()
    made.run.parts.wrapping.close()
    made.run.finished = True


def journal_of(
    run_dir: str | Path | RunJournal | None, wrapping: Wrapping, settings: Config
) -> RunJournal | None:
    """Return the journal a run writes; of several processes the first opens one."""
    if isinstance(run_dir, RunJournal):
        return run_dir
    if run_dir is None or wrapping.peers.rank:
        return None
    return RunJournal(run_dir, run=secrets.token_hex(8), config=digest_of(settings))


def govern(made: Growth, parts: RunComponents, stateful: Sequence[Restorable]) -> None:
    """Let the governor watch a run."""
    chosen = Settings(**made.config.governor.model_dump(exclude={"enabled"}))
    watch = GovernorHooks(made.run, chosen, averages=parts.averages, stateful=stateful)
    made.loop.watch = made.run.orchestrator.guard = watch
    made.loop.presence.closers.append(watch.watcher.close)


def digest_of(settings: Config) -> str:
    """Return what tells one set of settings from another."""
    text = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
