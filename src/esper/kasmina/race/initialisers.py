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
from torch import Tensor

from esper.blueprints.kernel import LiveKernel
from esper.kasmina.widths.layers import affine, is_linear, weight_of
from esper.kasmina.widths.pairs import Pair
from esper.kasmina.widths.places import Place
from esper.kasmina.widths.widen import WidenKernel

STARTS = {"svd": 1.0, "random": 0.0, "mixed": 5 / 8}  # share of candidates that begin with units of the pool

EXACT = 256  # dimensions up to which the decomposition is exact; randomised above
SCORED = 64  # examples on which directions are compared


@dataclass(frozen=True, slots=True)
class Survey:
    """A pool of units at one site, best first."""

    units: dict[str, Tensor]  # tensors with a slice per unit; empty where units cannot be told apart
    score: Tensor  # (pool,) squared gradient of each unit's outgoing weights, per example
    examples: int

    @property
    def improvement(self) -> float:
        """First-order decrease of the loss by the best unit, per unit of learning rate."""
        return float(self.score[0])


def survey(place: Place, x: Tensor, gradient: Tensor, pool: int) -> Survey:
    """Look for units worth having at one site.

    Args:
        place: The site.
        x: Inputs of a kernel there, (batch, …).
        gradient: Gradient of the batch's mean loss for the exit's output, (batch, …).
        pool: Number of units wanted.
    """
    with torch.enable_grad():
        kernel = place.kernel(pool).train()
        if isinstance(place, Pair) and isinstance(kernel, WidenKernel):
            exact = is_linear(place.producer) and is_linear(place.consumer)
            exact = exact and x.shape[:-1] == gradient.shape[:-1]
            own = kernel.producer_weight.detach()
            stretch(kernel, singular_directions(x, gradient, pool) if exact else own)
        x, gradient = x[:SCORED], gradient[:SCORED]
        if isinstance(kernel, WidenKernel):
            centre(kernel, x)
        outgoing = {name: kernel.get_parameter(name) for name in kernel.outgoing}
        product = (kernel(x) * gradient).sum()
        slopes = dict(zip(outgoing, torch.autograd.grad(product, list(outgoing.values())), strict=True))
    if not kernel.axes:
        total = sum(float(slope.square().sum()) for slope in slopes.values())
        return Survey({}, torch.tensor([total / pool]), x.shape[0])
    score = sum((per_unit(slope, kernel.axes[name], pool) for name, slope in slopes.items()), torch.zeros(()))
    order = score.argsort(descending=True)
    tensors = dict(kernel.named_parameters())
    units = {
        name: pick(tensors[name].detach(), axis, pool, order)
        for name, axis in kernel.axes.items()
        if name in tensors and name not in outgoing
    }
    return Survey(units, score[order], x.shape[0])


def per_unit(slope: Tensor, axis: int, units: int) -> Tensor:
    """Sum the squares of each unit's slices, (…, units * columns, …) -> (units,)."""
    rows = slope.detach().movedim(axis, 0).reshape(units, -1)
    wide = torch.promote_types(rows.dtype, torch.float32)  # squares in half width are nought
    return rows.to(wide).square().sum(1)


def pick(tensor: Tensor, axis: int, units: int, which: Tensor) -> Tensor:
    """Return the slices of some units, in the order asked for; a unit may hold several."""
    slices = tensor.movedim(axis, 0)
    own = slices.reshape(units, -1, *slices.shape[1:])  # (units, slices of each, …)
    return own[which.to(tensor.device)].flatten(0, 1).movedim(0, axis)


def sow(kernel: LiveKernel, pool: Survey, best: bool) -> None:
    """Give a candidate units of the pool: the best, or some drawn by their score."""
    if not pool.units:
        return
    units = len(pool.score)
    name, tensor = next(iter(pool.units.items()))
    each = tensor.shape[kernel.axes[name]] // units  # slices per unit
    size = min(kernel.get_parameter(name).shape[kernel.axes[name]] // each, units)
    chances = (pool.score.clamp_min(0) + 1e-12).cpu().float()
    picked = torch.arange(size) if best else torch.multinomial(chances, size)
    with torch.no_grad():
        for name, tensor in pool.units.items():
            own, axis = kernel.get_parameter(name), kernel.axes[name]
            own.narrow(axis, 0, size * (tensor.shape[axis] // units)).copy_(pick(tensor, axis, units, picked))
    if isinstance(kernel, WidenKernel):
        stretch(kernel, kernel.producer_weight.detach().clone())


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
        like = {"device": x.device, "dtype": values.dtype}  # whatever torch's default dtype is
        blends = torch.randn(pool - len(signed), len(values), **like) * values
        signed = torch.cat((signed, blends @ vectors))
    return signed


def stretch(kernel: WidenKernel, directions: Tensor) -> None:
    """Give the units these directions, as long as the host's own rows are on average."""
    with torch.no_grad():
        rows = weight_of(kernel.pair.producer).detach().flatten(1)  # (units, in * taps)
        flat = directions.flatten(1).to(rows.dtype)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12) * rows.norm(dim=1).mean()
        kernel.producer_weight.copy_(flat.view_as(kernel.producer_weight))


def centre(kernel: WidenKernel, x: Tensor) -> None:
    """Choose biases so that each unit's input is on average zero: neither dead nor linear."""
    if kernel.producer_bias is None:
        return
    with torch.no_grad():
        h = affine(kernel.pair.producer, x, kernel.producer_weight, None)
        axis = h.dim() - 1 if is_linear(kernel.pair.producer) else 1
        kernel.producer_bias.copy_(-h.mean(dim=[d for d in range(h.dim()) if d != axis]))
