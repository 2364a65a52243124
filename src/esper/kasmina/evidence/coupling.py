"""Does a loss couple the examples of a batch, or is each of them evidence of its own?

Some examples are passed twice, beside others each time. Where the gradients they get back are the same but
for one common factor, the loss says of each of them the same whatever it stands beside: a mean, a sum, a mean
by class weights or by counted tokens, the root of a mean. Contrastive losses, statistics of the batch and
differences of neighbours are told apart; so are losses of the hardest examples of a batch, for some are
asked beside the hardest, then beside the easiest. Both passes have the same shapes and the same random
numbers, so a loss that draws noise, as that of a VAE does, can be asked, too.

A model that is called several times in a pass shows several views. Two of each example, as a consistency loss
has them, are evidence of that example; a view of something else, the boundary of a physics problem, half of
the batch, is evidence of none: its rows do not follow the number of examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from esper.batches.examples import BatchLoss, split_batch, take
from esper.batches.layout import Batch
from esper.errors import ProbeError
from esper.kasmina.evidence.sight import Sight, by_example, passes
from esper.kasmina.widths.places import Place
from esper.surgery.isolation.contexts import evaluating, untouched
from esper.surgery.isolation.copies import on_copies, stirred

PARTS = 3  # of a batch: those asked, and the two that stand beside them
ALIKE = 1e-4  # relative, by which gradients may differ: a term .01 × std(0) moves them by 8e-4
ASKED = 8  # batches of a probe, until one tells whether the loss couples its examples
IGNORED = -100  # the target that torch's losses leave out


def independent(
    model: nn.Module,
    run: BatchLoss,
    places: Mapping[str, Place],
    batch: Batch,
    exactly: bool = False,
) -> bool | None:
    """Tell whether what a loss says of an example depends on the others by no more than a common factor.

    Rows whose integer entries are all -100 are left out first: torch's losses do not count them.

    Args:
        model: The host; in eval mode for the while, its weights and buffers as they are.
        run: ``run(batch) -> scalar``, a pass to the loss.
        places: Places where gradients are looked at, by name.
        batch: One batch of the probe; it should hold every kind of example.
        exactly: True where the factor must be 1: a mean or a sum is made of what single examples lose, but a
            mean by the weights of their classes, or by counted tokens, is not.

    Returns:
        None where it cannot be told: fewer than 3 examples that count, no place that is passed, no gradient,
        or none of one shape, as where sequences are filled up to the longest of a batch.

    Raises:
        ProbeError: The loss of a part of the batch cannot be taken.
    """
    kept = counted_rows(batch)
    each = len(kept) // PARTS
    if each == 0:
        return None
    rows = kept[: PARTS * each]
    try:
        with evaluating(model), torch.enable_grad():
            if not learns(model, run, take(batch, rows)):
                return None
            if not followed(model, run, places, take(batch, rows[: 2 * each])):
                return False
            found = compared(model, run, places, batch, rows, exactly)
            if found:  # as they come they may be alike: a loss of the hardest half is told by these
                ranked = rows[by_difficulty(model, run, places, take(batch, rows))]
                middle, ends = ranked[each : 2 * each], (ranked[:each], ranked[2 * each :])
                rows = torch.cat([middle, *ends])
                found = compared(model, run, places, batch, rows, exactly) is not False
    except (RuntimeError, ValueError, IndexError) as error:  # what torch raises where shapes do not fit
        raise ProbeError(
            f"the loss of {len(kept)} examples can be taken, that of {2 * each} of them cannot ({error}); "
            "evidence needs a model and a loss that take a batch of any size"
        ) from error
    return found


def learns(model: nn.Module, run: BatchLoss, batch: Batch) -> bool:
    """Tell whether a loss has gradients at all."""
    with untouched(model, seed=0):
        return run(batch).requires_grad


def compared(
    model: nn.Module,
    run: BatchLoss,
    places: Mapping[str, Place],
    batch: Batch,
    rows: Tensor,
    exactly: bool,
) -> bool | None:
    """Tell whether the first third of some rows gets the same gradients beside the second and the third."""
    first, second = both(model, run, places, batch, rows)
    if first.numel() and first.shape == second.shape and not (first.any() or second.any()):
        with on_copies(model, stirred):  # a gate that begins at zero lets nothing back, whatever the loss
            first, second = both(model, run, places, batch, rows)
    if first.shape != second.shape or not (first.any() or second.any()):
        return None
    if not first.any() or not second.any():
        return False  # what stands beside them decides whether they count
    factor = (first @ second) / second.square().sum()
    left = float((first - factor * second).norm() / first.norm())  # NaN where a gradient is not finite
    near = max(ALIKE, roundoff(model))
    fits = abs(float(factor) - 1) <= near if exactly else bool(factor > 0)
    return None if math.isnan(left) else fits and left <= near


def both(
    model: nn.Module, run: BatchLoss, places: Mapping[str, Place], batch: Batch, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the first third of some rows gets back beside the second, and beside the third."""
    own, beside, instead = rows.chunk(PARTS)
    first, second = (
        gradients(model, run, places, take(batch, torch.cat([own, others])), len(own)).flatten()
        for others in (beside, instead)
    )
    return first, second


def by_difficulty(model: nn.Module, run: BatchLoss, places: Mapping[str, Place], batch: Batch) -> Tensor:
    """Order the rows of a batch by how much of a gradient they get, the most first."""
    count = split_batch(batch)[3]
    return gradients(model, run, places, batch, count).norm(dim=1).argsort(descending=True, stable=True).cpu()


def gradients(
    model: nn.Module, run: BatchLoss, places: Mapping[str, Place], batch: Batch, each: int
) -> Tensor:
    """Return what the first examples of a batch get back at all places, (each, …), in float64."""
    sights, count = shown(model, run, places, batch), split_batch(batch)[3]
    back = [seen.gradient for name in sorted(sights) for view in sights[name] for seen in view.exits]
    rows = [by_example(gradient, count) for gradient in back if gradient is not None]
    found = [one[:each].flatten(1).double() for one in rows if one is not None]
    return torch.cat(found, 1) if found else torch.empty(each, 0)


def followed(model: nn.Module, run: BatchLoss, places: Mapping[str, Place], batch: Batch) -> bool:
    """Tell whether the rows of every view are those of the examples: half as many for half the batch.

    Asked only where a pass calls places several times, each for rows of its own, perhaps.
    """
    several = {name: place for name, place in places.items() if place.site.calls > 1}
    half = split_batch(batch)[3] // 2
    if not several or not half:
        return not several
    few, many = (shown(model, run, several, take(batch, torch.arange(count))) for count in (half, 2 * half))
    if few.keys() != many.keys() or any(len(few[name]) != len(many[name]) for name in few):
        return False
    pairs = [pair for name in few for pair in zip(few[name], many[name], strict=True)]
    return all(
        any(2 * short == long for short, long in zip(one.made.shape[:2], other.made.shape[:2], strict=False))
        for less, more in pairs
        for one, other in zip(less.exits, more.exits, strict=True)
    )


def shown(
    model: nn.Module, run: BatchLoss, places: Mapping[str, Place], batch: Batch
) -> dict[str, tuple[Sight, ...]]:
    """Return what one pass shows at the places, call by call."""
    with untouched(model, seed=0):
        (sights,) = (seen for seen, _ in passes(model, places, [(lambda: run(batch), 0)]))
    return sights


def counted_rows(batch: Batch) -> Tensor:
    """List the rows of a batch that a loss counts: all but those with integer entries of -100 only."""
    leaves, batched, _, count = split_batch(batch)
    kept = torch.ones(count, dtype=torch.bool)
    for leaf, many in zip(leaves, batched, strict=True):
        if many and isinstance(leaf, Tensor) and leaf.numel() and integers(leaf):
            kept &= ~(leaf.reshape(count, -1) == IGNORED).all(dim=1).cpu()
    return kept.nonzero().flatten()


def integers(leaf: Tensor) -> bool:
    """Tell whether a tensor holds whole numbers."""
    return not leaf.is_floating_point() and not leaf.is_complex()


def roundoff(model: nn.Module) -> float:
    """Return how far apart, relatively, equal gradients may be in the coarsest of the numbers computed in."""
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    coarsest = max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(torch.float32).eps)
    return 8 * coarsest  # .06 for bfloat16: sums of products are rounded; coupling is above
