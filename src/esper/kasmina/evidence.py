"""Held-out evidence: is the loss lower with the kernel than without it, beyond what chance explains?

Per-example differences are paired: same weights, same examples, eval mode. They feed an e-value, a bet
against "the kernel does not help" whose expected wealth is at most 1 when that is true (Waudby-Smith &
Ramdas, JRSS-B 2024). The bet clips, so that one wild example cannot win; the mean of clipped differences is
not the loss, so the p-value of the mean must agree (`significance.py`). The run's false-keep budget is shared
evenly by its looks (union bound), so looking often is paid for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper.errors import ProbeError
from esper.kasmina.isolation import evaluating, untouched
from esper.kasmina.layout import chosen, flatten, joined, unflatten
from esper.kasmina.layout import rows as rows_in
from esper.kasmina.significance import p_value

LossFunction = Callable[[nn.Module, Any], Tensor]

STAKES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8)  # half the wealth is spread over these
BOUND = (
    2.0  # clipping, in root-mean-square differences on the rehearsal; 3 won 10 % less per example (digits)
)


IGNORED = -100  # the target that torch's losses leave out


def e_value(differences: np.ndarray, rehearsal: np.ndarray) -> float:
    """Return the wealth won by betting that the mean of ``differences`` is positive.

    Args:
        differences: (examples,) loss without minus loss with the kernel; held out.
        rehearsal: The same on training examples. Scale and stake of the bets come from here, so they are
            fixed before the first held-out example is seen; that is what keeps the bet fair.

    Returns:
        A number that exceeds 1/p with probability at most p when the clipped mean is not positive; 0 where
        nothing is known.
    """
    bound = BOUND * float(np.sqrt(np.mean(np.square(rehearsal)))) if len(rehearsal) else 0.0
    if (
        not (bound > 0 and math.isfinite(bound))
        or len(differences) == 0
        or not np.isfinite(differences).all()
    ):
        return 0.0
    practice = np.clip(rehearsal / bound, -1.0, 1.0)
    kelly = float(np.clip(practice.mean() / np.square(practice).mean(), STAKES[0], STAKES[-1]))
    bets = np.clip(differences / bound, -1.0, 1.0)
    wealth = np.array([np.log1p(stake * bets).sum() for stake in (kelly, *STAKES)])
    shares = np.array([0.5] + [0.5 / len(STAKES)] * len(STAKES))
    top = float(wealth.max())
    return math.exp(min(top, 700.0)) * float((shares * np.exp(wealth - top)).sum())


def weight_of_evidence(differences: np.ndarray, rehearsal: np.ndarray) -> float:
    """Return the wealth of the bet, and no more than 1/p of the mean: both must say that the loss is lower.

    Where rare large losses undo frequent small gains, clipping hides them from the bet: it alone kept 0.29 of
    kernels that harm, where 0.05 was promised. How far the p-value can be trusted: `esper bench evidence`.
    """
    p = p_value(differences)
    return 0.0 if p is None else min(e_value(differences, rehearsal), 1.0 / p)


def split_batch(batch: Any) -> tuple[list[Any], list[bool], Any, int]:
    """Take a batch apart: leaves, which of them have an entry per example, nesting, and number of examples.

    Raises:
        ProbeError: No tensor tells how many examples there are.
    """
    leaves, nest = flatten(batch)
    counts = [rows_in(leaf) for leaf in leaves]
    sizes = [
        n for n, leaf in zip(counts, leaves, strict=True) if n is not None and not isinstance(leaf, list)
    ]
    if not sizes:
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "nothing"
        raise ProbeError(
            f"a batch holds no tensor with a batch axis, but {kinds}; evidence needs examples along axis "
            "0 of tensors in tuples, lists, mappings or dataclasses"
        )
    return leaves, [n == sizes[0] for n in counts], nest, sizes[0]


def count_examples(batch: Any) -> int:
    """Count a batch's examples; asked at every step, so the usual tuple is not taken apart (40 µs).

    Raises:
        ProbeError: No tensor tells how many examples there are.
    """
    first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(first, Tensor) and first.dim() > 0:
        return first.shape[0]
    return split_batch(batch)[3]


SMALL, DOZEN = 3, 12  # examples: fewer cannot be cut into unequal parts; in so few, coupling shows


def additive(model: nn.Module, loss_fn: LossFunction, batch: Any) -> bool | None:
    """Tell whether a batch's loss is the mean, or the sum, of what its examples lose alone, in eval mode.

    The loss of the whole is compared with that of its two parts, cut unequally and in two ways, and with that
    of the reversed order; then of a dozen examples, where a weak coupling shows more (that of a term
    .01 × std(0) is 5e-6 of the loss of 40). Losses that couple examples (contrastive, class-weighted means,
    batch statistics) differ. Rows whose integer entries are all -100 are left out first: torch's losses do
    not count them.

    Args:
        model: Put into eval mode for the while.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        batch: A probe batch; it should hold every kind of example.

    Returns:
        None where it cannot be told: fewer than 3 examples that count, a loss that is not finite, or that is
        another one with other random numbers.

    Raises:
        ProbeError: The loss of a part of the batch cannot be taken.
    """
    kept = counted_rows(batch)
    if len(kept) < SMALL:
        return None
    few = kept[:DOZEN]
    interleaved = kept[1::3], torch.cat([kept[0::3], kept[2::3]])
    with evaluating(model):
        try:
            whole, other = (seeded_loss(model, loss_fn, take(batch, kept), seed) for seed in (0, 1))
            if not math.isfinite(whole) or whole != other:
                return None
            back, dozen = (seeded_loss(model, loss_fn, take(batch, rows), 0) for rows in (kept.flip(0), few))
            found = [
                (total, [(len(rows), seeded_loss(model, loss_fn, take(batch, rows), 0)) for rows in cut])
                for total, cut in ((whole, unequal(kept)), (whole, interleaved), (dozen, unequal(few)))
            ]
        except (RuntimeError, ValueError, IndexError) as error:  # what torch raises where shapes do not fit
            raise ProbeError(
                f"the loss of {len(kept)} examples can be taken, that of a part of them cannot ({error}); "
                "evidence needs a model and a loss that take a batch of any size"
            ) from error
    near = closeness(model) * max(abs(whole), abs(back), *(abs(loss) for _, cut in found for _, loss in cut))
    mean = all(abs(w - sum(n * v for n, v in cut) / sum(n for n, _ in cut)) <= near for w, cut in found)
    total = all(abs(w - sum(v for _, v in cut)) <= near for w, cut in found)
    return abs(whole - back) <= near and (mean or total)


def unequal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Cut rows into the first third and the rest."""
    third = max(len(rows) // 3, 1)
    return rows[:third], rows[third:]


def counted_rows(batch: Any) -> Tensor:
    """List the rows of a batch that a loss counts: all but those with integer entries of -100 only."""
    leaves, batched, _, count = split_batch(batch)
    kept = torch.ones(count, dtype=torch.bool)
    for leaf, many in zip(leaves, batched, strict=True):
        if (
            many
            and isinstance(leaf, Tensor)
            and not leaf.is_floating_point()
            and not leaf.is_complex()
            and leaf.numel()
        ):
            kept &= ~(leaf.reshape(count, -1) == IGNORED).all(dim=1).cpu()
    return kept.nonzero().flatten()


def take(batch: Any, rows: Tensor) -> Any:
    """Return some examples of a batch, in the order given; leaves without examples stay."""
    leaves, batched, nest, _ = split_batch(batch)
    some = [chosen(leaf, rows) if many else leaf for leaf, many in zip(leaves, batched, strict=True)]
    return unflatten(some, nest)


def seeded_loss(model: nn.Module, loss_fn: LossFunction, batch: Any, seed: int) -> float:
    """Return the loss of a batch, every random number from ``seed``."""
    with untouched(model, seed):
        return float(loss_fn(model, batch).detach())


def closeness(model: nn.Module) -> float:
    """Return how far apart, relatively, equal losses may be in the coarsest of the numbers computed in."""
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point()]
    coarsest = max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(torch.float32).eps)
    return coarsest ** (
        2 / 3
    )  # 2e-5 for float32, 4e-2 for bfloat16: rounding of sums is below, coupling above


def example_losses(model: nn.Module, loss_fn: LossFunction, batch: Any) -> tuple[Tensor, bool]:
    """Return the loss of every example alone, (examples,), and whether they ran together.

    A scalar loss says nothing of its examples, so each is run as a batch of one, all at once under vmap;
    where the model or the loss cannot be batched (data-dependent branches, ``.item()``), one after the other.
    """
    leaves, batched, nest, count = split_batch(batch)
    own = [leaf for leaf, many in zip(leaves, batched, strict=True) if many]

    def one(*parts: Tensor) -> Tensor:
        rest = iter(parts)
        filled = [
            next(rest).unsqueeze(0) if many else leaf for leaf, many in zip(leaves, batched, strict=True)
        ]
        return loss_fn(model, unflatten(filled, nest))

    if not all(isinstance(leaf, Tensor) for leaf in own):  # vmap knows tensors only
        return torch.stack([loss_fn(model, take(batch, torch.tensor([i]))) for i in range(count)]), False
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no batching rule and warn of it
            return vmap(one, randomness="different")(*own), True
    except RuntimeError:
        return torch.stack([one(*(leaf[i] for leaf in own)) for i in range(count)]), False


def join(batches: Iterable[Any]) -> list[Any]:
    """Join batches of one shape of nest: into one, unless a leaf without examples differs."""
    parts = [split_batch(batch) for batch in batches]
    if not parts:
        return []
    leaves, batched, nest, _ = parts[0]
    if any(p[2] != nest or p[1] != batched for p in parts):
        return [unflatten(p[0], p[2]) for p in parts]
    shapes = {
        tuple(getattr(leaf, "shape", (0,))[1:] for leaf, many in zip(p[0], batched, strict=True) if many)
        for p in parts
    }
    if len(shapes) > 1:  # sequences of unlike length
        return [unflatten(p[0], p[2]) for p in parts]
    whole = [joined([p[0][i] for p in parts]) if many else leaves[i] for i, many in enumerate(batched)]
    return [unflatten(whole, nest)]
