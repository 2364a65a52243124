"""Measure all sites in one extra pass over a recent batch; nothing stays installed, nothing of training moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.contracts import HealthReport
from esper.kasmina.isolation import same_randomness, untouched
from esper.kasmina.layer import KasminaLayer, Tap
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.sites import Pair
from esper.kasmina.starts import Survey, survey
from esper.kasmina.widen import affine


@dataclass(frozen=True, slots=True)
class Measured:
    """One site's survey with the inputs it was made on."""

    report: HealthReport
    survey: Survey
    x: Tensor


def measure(model: MorphableModel, sites: Sequence[str], run: Callable[[], Tensor], seed: int, pool: int, examples: int) -> dict[str, Measured]:  # fmt: skip
    """Survey sites.

    Args:
        model: Owns the sites; all of them must be dormant.
        sites: Names.
        run: One training-mode pass to the mean loss of a batch.
        seed: Of the random numbers used here.
        pool: Directions to look for per site.
        examples: Examples read at most.
    """
    layers = {name: KasminaLayer(model.pairs[name], lambda error: None) for name in sites}
    taps = {name: Tap() for name in sites}
    host = [parameter for parameter in model.host.parameters() if parameter.requires_grad]
    try:
        for name, layer in layers.items():
            layer.open()
            layer.tap = taps[name]
        with untouched(model.host, seed):
            torch.autograd.grad(run(), host, allow_unused=True)
    finally:
        for layer in layers.values():
            layer.close()
    found = {}
    with same_randomness(seed), untouched(model.host):
        for name, tap in taps.items():
            if tap.fresh():
                found[name] = inspect(model.pairs[name], tap, pool, examples)
    return found


def inspect(pair: Pair, tap: Tap, pool: int, examples: int) -> Measured:
    """Turn what a tap saw into a survey and a report."""
    assert tap.x is not None and tap.gradient is not None
    x, gradient = tap.x[:examples].clone(), tap.gradient[:examples]
    found = survey(pair, x, gradient, pool)
    with torch.no_grad():
        h = affine(pair.producer, x, pair.producer.weight, pair.producer.bias)
        for step in pair.steps:
            own = {name: getattr(step.module, name) for name in getattr(step, "owned", ())}  # type: ignore[attr-defined]
            h = step.run(h, own, training=False)
        flat = h.float()
        silent = (flat == 0).flatten(0, -2) if flat.dim() != 4 else (flat == 0).transpose(1, 3).flatten(0, 2)
        report = HealthReport(
            site=pair.site.name, improvement=found.improvement, examples=len(x),
            activation_mean=float(flat.mean()), activation_variance=float(flat.var()),
            dead=float(silent.all(0).float().mean()), gradient_norm=float(gradient.norm()),
        )  # fmt: skip
    return Measured(report, found, x)
