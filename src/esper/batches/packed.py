"""Packed sequences, as recurrent layers read them: one example in each sequence.

Their data lies moment by moment, so no axis of it is that of the examples: they are taken apart and packed
anew.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence


def count(packed: PackedSequence) -> int:
    """Count the sequences: all of them have a first moment."""
    return int(packed.batch_sizes[0]) if len(packed.batch_sizes) else 0


def sequences(packed: PackedSequence) -> list[Tensor]:
    """Return the sequences, (time, …) each, in the order they were given in."""
    return unpack_sequence(packed) if count(packed) else []


def packed_like(packed: PackedSequence, each: Sequence[Tensor]) -> PackedSequence:
    """Pack sequences as others were: sorted ones stay sorted, as ONNX and cuDNN may want them."""
    if not each:
        return PackedSequence(packed.data[:0], packed.batch_sizes[:0])
    lengths = [len(one) for one in each]
    ordered = packed.sorted_indices is None and lengths == sorted(lengths, reverse=True)
    return pack_sequence(list(each), enforce_sorted=ordered)


def taken(packed: PackedSequence, which: Tensor) -> PackedSequence:
    """Return some sequences, in the order given."""
    each = sequences(packed)
    return packed_like(packed, [each[i] for i in which.tolist()])


def own(packed: PackedSequence) -> PackedSequence:
    """Copy the data, without the graph behind it."""
    data = packed.data.detach().clone().requires_grad_(packed.data.requires_grad)
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def alike(one: PackedSequence, other: PackedSequence) -> bool:
    """Tell whether two can be packed together."""
    kinds = [(each.data.dtype, each.data.shape[1:], each.data.device) for each in (one, other)]
    return kinds[0] == kinds[1]


def joined(parts: Sequence[PackedSequence]) -> PackedSequence:
    """Return the sequences of several, one behind the other."""
    return packed_like(parts[0], [one for part in parts for one in sequences(part)])
