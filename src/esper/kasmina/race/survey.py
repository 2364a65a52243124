"""Measure all sites in one extra pass over recent batches; nothing stays installed, training unmoved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.contracts import HealthReport
from esper.distributed.collectives import ALONE, Peers
from esper.kasmina.evidence.sight import dead
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.initialisers import Survey, survey
from esper.kasmina.seeds.layer import KasminaLayer, Tap
from esper.kasmina.seeds.state import KasminaStateLayout
from esper.kasmina.widths.layers import affine, bias_of, is_linear, weight_of
from esper.kasmina.widths.pairs import Pair
from esper.kasmina.widths.places import Place
from esper.surgery.isolation.contexts import same_randomness, untouched
from esper.surgery.isolation.undisturbed import undisturbed


@dataclass(frozen=True, slots=True)
class Measured:
    """One site's survey with the inputs it was made on."""

    report: HealthReport
    survey: Survey
    x: Tensor  # what a kernel reads there
    gradient: Tensor  # of the loss for the exit's output
    scale: Tensor  # root mean square of that output, 0-dim


def measure(
    model: MorphableModel,
    sites: Sequence[str],
    runs: Sequence[Callable[[], Tensor]],
    seed: int,
    pool: int,
    examples: int,
    peers: Peers = ALONE,
) -> dict[str, Measured]:
    """Survey sites.

    Args:
        model: Owner of the sites; all of them must be dormant.
        sites: Names.
        runs: Training-mode passes to the mean losses of recent batches.
        seed: Seed of the random numbers used here.
        pool: Directions to look for per site.
        examples: Examples read at most.
        peers: Other processes, whose examples count too.
    """
    layers = {name: KasminaLayer(model.places[name], lambda error: None) for name in sites}
    seen: dict[str, list[Tap]] = {name: [] for name in sites}
    host = [parameter for parameter in model.host.parameters() if parameter.requires_grad]
    try:
        with undisturbed():
            for layer in layers.values():
                layer.open()
        for run in runs:
            for name, layer in layers.items():
                layer.tap = Tap()
                seen[name].append(layer.tap)
            with untouched(model.host, seed):
                torch.autograd.grad(run(), host, allow_unused=True)
    finally:
        with undisturbed():
            for layer in layers.values():
                layer.close()
    found = {}
    with same_randomness(seed), untouched(model.host):
        for name, taps in seen.items():
            fresh = [tap for tap in taps if tap.fresh()]
            scale = fresh[-1].scale if fresh else None
            if peers.all_ranks(scale is not None) and scale is not None:
                x, gradient = joined(fresh, max(examples // peers.world, 1))
                scale = scale.clone()
                peers.all_reduce_mean([scale])
                x, gradient = peers.all_gather_rows(x), peers.all_gather_rows(gradient) / peers.world
                found[name] = inspect(model.places[name], x, gradient, scale, pool)
    return found


def joined(taps: Sequence[Tap], examples: int) -> tuple[Tensor, Tensor]:
    """Return inputs and output gradients of several passes as one batch, the newest where shapes differ."""
    seen = [(tap.x, tap.gradient) for tap in taps if tap.x is not None and tap.gradient is not None]
    alike = [(x, gradient) for x, gradient in seen if x.shape[1:] == seen[-1][0].shape[1:]]
    xs, gradients = zip(*alike, strict=True)
    return torch.cat(xs)[-examples:], torch.cat(gradients)[-examples:] / len(gradients)


def inspect(place: Place, x: Tensor, gradient: Tensor, scale: Tensor, pool: int) -> Measured:
    """Turn what the taps saw into a survey and a report."""
    units = place.site.granularity * max(pool // place.site.granularity, 1)
    found = survey(place, x, gradient, units)
    units_seen = hidden(place, x) if isinstance(place, Pair) else {}
    norm = float(gradient.norm())
    report = HealthReport(place.site.name, found.improvement, len(x), gradient_norm=norm, **units_seen)
    return Measured(report, found, x, gradient, scale)


def hidden(pair: Pair, x: Tensor) -> dict[str, float]:
    """Measure the units a pair has: mean, variance and share of dead ones."""
    with torch.no_grad():
        h = affine(pair.producer, x, weight_of(pair.producer), bias_of(pair.producer))
        for step in pair.steps:
            h = step.run(h, step.tensors(), training=False)
        flat = h.float()
        return {
            "activation_mean": float(flat.mean()),
            "activation_variance": float(flat.var()),
            "dead": dead(flat, -1 if is_linear(pair.consumer) else 1),
        }


def vitals(
    layout: KasminaStateLayout, seed: int, sample: tuple[Tensor, float], gradient: float
) -> dict[str, float | None]:
    """Smooth what a sampled pass showed of an exposed kernel; no decision reads it.

    Args:
        layout: Keeps the smoothed numbers.
        seed: Row of the seed whose kernel it is.
        sample: Output of the kernel, and the milliseconds it took.
        gradient: Norm over its parameters.
    """
    output, milliseconds = sample
    measured = {
        "variance": float(output.float().var()),
        "gradient": gradient,
        "dead": dead(output, 1 if output.dim() == 4 else -1),
    }
    layout.observe_seed(seed, **measured, latency=milliseconds)
    told = {name: value for name, value in layout.vitals_of(seed).items() if name != "latency"}
    return {"score": layout.health_score(seed), **told}
