"""Where candidates start: input directions the loss would most like a new unit to have.

With its outgoing weights at zero, a unit first learns at a rate proportional to the gradient of those
weights, so good input weights make that gradient large (GradMax, Evci et al., ICLR 2022). Between Linear
layers the linearised answer is exact: right singular vectors of the cross-covariance of output gradient and
input, and a rectifier sees only half of a direction, so both signs are tried. Elsewhere a pool of random
directions is scored by the true gradient, through whatever stands between; climbing that gradient as well
made all units of a pool alike and the races worse (digits CNN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.kasmina.pairs import Pair
from esper.kasmina.widen import WidenKernel, affine

EXACT = 256  # dimensions up to which the decomposition is exact; randomised above
SCORED = 64  # examples on which directions are compared


@dataclass(frozen=True, slots=True)
class Survey:
    """A pool of directions at one site, best first."""

    weight: Tensor  # (pool, in, *taps)
    bias: Tensor | None  # (pool,)
    score: Tensor  # (pool,) squared gradient of each unit's outgoing weights, per example
    examples: int

    @property
    def improvement(self) -> float:
        """First-order decrease of the loss by the best unit, per unit of learning rate."""
        return float(self.score[0])


def survey(pair: Pair, x: Tensor, gradient: Tensor, pool: int) -> Survey:
    """Look for input directions at one site.

    Args:
        pair: The site.
        x: Input of the producer, (batch, …).
        gradient: Of the batch's mean loss for the consumer's output, (batch, …).
        pool: Directions wanted.
    """
    with torch.enable_grad():
        kernel = WidenKernel(pair, pool).train()
        exact = isinstance(pair.producer, nn.Linear) and isinstance(pair.consumer, nn.Linear)
        exact = exact and x.shape[:-1] == gradient.shape[:-1]
        place(kernel, singular_directions(x, gradient, pool) if exact else kernel.producer_weight.detach())
        x, gradient = x[:SCORED], gradient[:SCORED]
        centre(kernel, x)
        (slope,) = torch.autograd.grad((kernel(x) * gradient).sum(), kernel.consumer_weight)
    score = per_unit(slope, pool)
    order = score.argsort(descending=True)
    bias = None if kernel.producer_bias is None else kernel.producer_bias.detach()[order]
    return Survey(kernel.producer_weight.detach()[order], bias, score[order], x.shape[0])


def per_unit(slope: Tensor, units: int) -> Tensor:
    """Sum the squares of each unit's columns, (out, units * columns, *taps) -> (units,)."""
    return slope.detach().reshape(slope.shape[0], units, -1).square().sum(dim=(0, 2))


def singular_directions(x: Tensor, gradient: Tensor, pool: int) -> Tensor:
    """Return ±right singular vectors, best first, then blends of them drawn at random, (pool, in)."""
    inputs, outputs = x.reshape(-1, x.shape[-1]).float(), gradient.reshape(-1, gradient.shape[-1]).float()
    cross = outputs.T @ (inputs - inputs.mean(0))  # (out, in)
    if min(cross.shape) > EXACT:
        _, values, vectors = torch.svd_lowrank(cross, q=min(pool, EXACT))
        vectors = vectors.T
    else:
        _, values, vectors = torch.linalg.svd(cross, full_matrices=False)  # (rank,), (rank, in)
    signed = torch.stack((vectors, -vectors), 1).flatten(0, 1)[:pool]  # (2 * rank, in)
    if len(signed) < pool:
        blends = torch.randn(pool - len(signed), len(values), device=x.device) * values
        signed = torch.cat((signed, blends @ vectors))
    return signed


def place(kernel: WidenKernel, directions: Tensor) -> None:
    """Give the units these directions, as long as the host's own rows are on average."""
    with torch.no_grad():
        rows = kernel.pair.producer.weight.detach().flatten(1)  # (units, in * taps)
        flat = directions.flatten(1).to(rows.dtype)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12) * rows.norm(dim=1).mean()
        kernel.producer_weight.copy_(flat.view_as(kernel.producer_weight))


def centre(kernel: WidenKernel, x: Tensor) -> None:
    """Choose biases so that each unit's input is on average zero: neither dead nor linear."""
    if kernel.producer_bias is None:
        return
    with torch.no_grad():
        h = affine(kernel.pair.producer, x, kernel.producer_weight, None)
        axis = h.dim() - 1 if isinstance(kernel.pair.producer, nn.Linear) else 1
        kernel.producer_bias.copy_(-h.mean(dim=[d for d in range(h.dim()) if d != axis]))
