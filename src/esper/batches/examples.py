"""What a batch holds: its examples counted, taken, copied, joined, and the loss of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import PackedSequence

from esper.batches import packed
from esper.batches.layout import (
    PARTS,
    PLAIN,
    Batch,
    Layout,
    Leaf,
    chosen,
    flatten,
    is_list,
    unflatten,
    unreadable,
)
from esper.batches.layout import rows as rows_in
from esper.batches.objects import described, tensors_of, with_rows
from esper.errors import ProbeError
from esper.printable import raised

OBJECTS = (
    "give a list with one such object for each example and put them together in loss_fn, or tensors in a "
    "dataclass"
)

LossFunction = Callable[[nn.Module, Any], Tensor]  # the user's own, for batches of the user's own kind
PerExample = Callable[[nn.Module, Any], Tensor]  # (examples,) losses
BatchLoss: TypeAlias = Callable[[Batch], Tensor]  # the scalar loss of a batch, through a model as it is
Split: TypeAlias = tuple[
    list[Any], list[bool], Layout, int
]  # see split_batch; leaves are what torch calls them


def split_batch(batch: Batch) -> Split:
    """Take a batch apart: leaves, which of them have an entry per example, nesting, and number of examples.

    Raises:
        ProbeError: No tensor tells how many examples there are.
    """
    leaves, nest = flatten(batch)
    counts = [rows_in(leaf) for leaf in leaves]
    sizes = [
        n for n, leaf in zip(counts, leaves, strict=True) if n is not None and not isinstance(leaf, list)
    ]
    sizes = sizes or [len(leaf) for leaf in leaves if isinstance(leaf, list) and not is_list(leaf)]
    if not sizes:
        kinds = ", ".join(sorted({described(leaf) for leaf in leaves})) or "nothing"
        instead = f"; {OBJECTS}" if any(any(tensors_of(leaf)) for leaf in leaves) else ""
        raise ProbeError(
            f"a batch holds no tensor with a batch axis, but {kinds}; evidence needs examples along axis "
            f"0 of tensors in tuples, lists, mappings or dataclasses{instead}"
        )
    return leaves, [n == sizes[0] for n in counts], nest, sizes[0]


def count_examples(batch: Batch) -> int:
    """Count a batch's examples; asked at every step, so the usual tuple or dict is not taken apart (40 µs).

    Raises:
        ProbeError: No tensor tells how many examples there are.
    """
    first = batch
    try:
        if isinstance(batch, MutableMapping):
            first = next(iter(batch.values()), None)
        elif isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence) and batch:
            first = batch[0]
    except Exception as error:  # it is the methods of the user's own containers that run here
        raise unreadable(batch, error) from error
    if isinstance(first, Tensor) and first.dim() > 0 and not (isinstance(batch, list) and len(batch) > PARTS):
        return first.size(0)
    return split_batch(batch)[3]


def refuse_layouts(batch: Batch) -> None:
    """Refuse a batch with tensors of which no examples can be taken.

    Raises:
        ProbeError: It holds a nested tensor, or a sparse one or an object with a row for each example.
    """
    held = flatten(batch)[0]
    leaves = [leaf for leaf in held if isinstance(leaf, Tensor)]
    if any(leaf.is_nested for leaf in leaves):
        raise ProbeError(
            "a batch holds a nested tensor, of which evidence can take no examples; give a list with one "
            "tensor per example and nest it in loss_fn, or pad it"
        )
    sparse = next((leaf for leaf in leaves if leaf.layout != torch.strided), None)
    if sparse is not None and len(sparse) == count_examples(batch):
        raise ProbeError(
            f"a batch holds a sparse tensor ({sparse.layout}) with a row for each example, and evidence can "
            "take none of them; give indices and values per example and make it sparse in loss_fn, or "
            "to_dense()"
        )
    count = count_examples(batch)
    others = [leaf for leaf in held if rows_in(leaf) is None and not isinstance(leaf, (Tensor, np.ndarray))]
    whole = next((leaf for leaf in others if with_rows(leaf, count)), None)
    if whole is not None:
        raise ProbeError(
            f"a batch holds a {described(whole)} with a row for each of {count} examples, and evidence can "
            f"take none of them; {OBJECTS}"
        )


def take(batch: Batch, rows: Tensor) -> Batch:
    """Return some examples of a batch, in the order given; leaves without examples stay."""
    leaves, batched, nest, _ = split_batch(batch)
    some = [chosen(leaf, rows) if many else leaf for leaf, many in zip(leaves, batched, strict=True)]
    return unflatten(some, nest)


def copied(batch: Batch) -> Batch:
    """Return a batch with tensors of its own: a loop may fill the same ones again at the next step."""
    leaves, nest = flatten(batch)
    return unflatten([own(leaf) for leaf in leaves], nest)


def own(leaf: Leaf) -> Leaf:
    """Copy a leaf that can be written to; a tensor comes without the graph behind it."""
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    if isinstance(leaf, list) or type(leaf) is tuple:
        return type(leaf)(copied(one) for one in leaf)
    if isinstance(leaf, PackedSequence):
        return packed.own(leaf)
    return copy.copy(leaf)  # an array's


def smaller(batch: Batch) -> list[Batch]:
    """Return the first half of a batch; none where it is too small to be cut."""
    half = count_examples(batch) // 2
    return [take(batch, torch.arange(half))] if half > 1 else []


def example_losses(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> tuple[Tensor, str]:
    """Return the loss of every example alone, (examples,), and why they did not run together, if so.

    A scalar loss says nothing of its examples, so each is run as a batch of one, all at once under vmap;
    where the model or the loss cannot be batched (data-dependent branches, ``.item()``), one after the other.
    What a loss raises by itself it raises there, too.
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
        alone = [loss_fn(model, take(batch, torch.tensor([i]))) for i in range(count)]
        return torch.stack(alone), "a batch holds more than tensors"
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no batching rule and warn of it
            return vmap(one, randomness="different")(*own), ""
    except RuntimeError as error:
        why = raised(error)
    # Behind the clause: an error keeps alive what its frames held, and memory may be what was short.
    return torch.stack([one(*(leaf[i] for leaf in own)) for i in range(count)]), why


def join(batches: Iterable[Batch]) -> list[Batch]:
    """Join batches of one shape of nest: into one, unless a leaf without examples differs."""
    parts = [split_batch(batch) for batch in batches]
    if not parts:
        return []
    leaves, batched, nest, _ = parts[0]
    if any(p[2] != nest or p[1] != batched or not shared(leaves, p[0], batched) for p in parts):
        return [unflatten(p[0], p[2]) for p in parts]
    shapes = {
        tuple(getattr(leaf, "shape", (0,))[1:] for leaf, many in zip(p[0], batched, strict=True) if many)
        for p in parts
    }
    packs = [[leaf for leaf in p[0] if isinstance(leaf, PackedSequence)] for p in parts]
    alike_packs = all(packed.alike(a, b) for some in packs for a, b in zip(packs[0], some, strict=True))
    if len(shapes) > 1 or not alike_packs:  # sequences of unlike length
        return [unflatten(p[0], p[2]) for p in parts]
    whole = [joined(parts, i) if many else leaves[i] for i, many in enumerate(batched)]
    return [unflatten(whole, nest)]


def shared(one: Sequence[Leaf], other: Sequence[Leaf], batched: Sequence[bool]) -> bool:
    """Tell whether two batches hold the same beside their examples, so that either's serves both."""
    return all(many or alike(a, b) for a, b, many in zip(one, other, batched, strict=True))


def alike(one: Leaf, other: Leaf) -> bool:
    """Tell whether two leaves certainly hold the same."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.layout != torch.strided or other.layout != torch.strided:  # torch compares no sparse ones
            return False
        kinds = [(leaf.shape, leaf.dtype, leaf.device) for leaf in (one, other)]
        return kinds[0] == kinds[1] and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return isinstance(one, PLAIN) and isinstance(other, PLAIN) and one == other


def joined(parts: list[Split], at: int) -> Leaf:
    """Return the leaves that stand at one place of each batch, one behind the other."""
    leaves = [leaves[at] for leaves, *_ in parts]
    if isinstance(leaves[0], Tensor):
        return torch.cat(leaves)  # (examples of all batches, ...)
    if isinstance(leaves[0], np.ndarray):
        return np.concatenate(leaves)
    if isinstance(leaves[0], PackedSequence):
        return packed.joined(leaves)
    return type(leaves[0])(one for leaf in leaves for one in leaf)
