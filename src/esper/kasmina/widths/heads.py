"""Heads of self-attention: q, k and v read one input, plain softmax attention, one layer behind.

A new head is head_dim rows in q, k and v and as many columns in the layer behind; with those columns at zero
the output does not move. A unit is one channel, so that starts and scores work as for any pair; widths grow
by whole heads. One layer may make all three, and several heads of q may share one of k and v.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts import Site, WidenEdit, WidenPlan
from esper.kasmina.widths.draft import Draft
from esper.kasmina.widths.layers import (
    affine,
    in_size,
    out_size,
)
from esper.kasmina.widths.pairs import TwoEnded, unit_parameters
from esper.kasmina.widths.widen import HostKernel

ROLES = ("producer", "key", "value")


@dataclass(frozen=True)
class Count:
    """A number of the user's own modules that grows with the heads."""

    path: str
    module: nn.Module
    attribute: str
    per_head: int  # 1, or head_dim where it counts the inner width; times ``group`` where those of q

    def plus(self, heads: int) -> tuple[str, str, int]:
        """Return (module, attribute, value with more heads)."""
        return self.path, self.attribute, getattr(self.module, self.attribute) + heads * self.per_head


@dataclass(frozen=True)
class HeadsPair(TwoEnded):
    """A site with the host's own modules at hand; a unit is one channel of k, widths grow by whole heads.

    With grouped queries a head is one of k and v with ``group`` heads of q, and a unit one channel of each.
    """

    site: Site
    names: tuple[str, str, str, str]  # q, k, v, the layer behind; the same three where one layer makes all
    producer: nn.Module  # q
    key: nn.Module
    value: nn.Module
    consumer: nn.Module
    causal: bool
    scale: float
    dropout: float  # on the attention weights, in training
    counts: tuple[Count, ...]
    time: int  # positions per example in the probe, for FLOPs
    group: int = 1  # heads of q per head of k and v
    order: tuple[int, int, int] = (0, 1, 2)  # of q, k and v in one layer
    by_head: bool = False  # in one layer: each head's q, k and v together, not all heads of q first

    @property
    def columns(self) -> int:
        """Columns of the layer behind per unit."""
        return self.group

    @property
    def fused(self) -> bool:
        """One layer makes q, k and v."""
        return self.producer is self.key

    @property
    def rows(self) -> int:
        """Rows of the first layer per unit."""
        return 3 if self.fused else self.group

    def used(self) -> Mapping[str, int]:
        """Map all layers to the positions at which they run."""
        return dict.fromkeys(self.names, self.time)

    def kernel(self, units: int) -> HeadsKernel:
        """Build new heads; the columns of the layer behind are zero."""
        return HeadsKernel(self, units)

    def layers(self) -> tuple[tuple[str, str, nn.Module, int], ...]:
        """List (role, path, layer, rows per unit) of q, k and v."""
        layers = zip(
            ROLES, self.names, (self.producer, self.key, self.value), (self.rows, 1, 1), strict=False
        )
        return tuple(layers)[: 1 if self.fused else 3]

    def refreshed(self) -> HeadsPair:
        """Return the pair with its layers' facts as they are now."""
        outgoing = self.group * out_size(self.consumer)
        parameters = sum(unit_parameters(layer) * each for _, _, layer, each in self.layers()) + outgoing
        rows = (self.group + 2) * in_size(self.producer) + outgoing
        flops = 2 * self.time * (rows + 2 * self.group * self.time)
        width = out_size(self.producer) // self.rows
        site = replace(self.site, width=width, unit_parameters=parameters, unit_flops=flops)
        return replace(self, site=site)

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` channels are added."""
        draft = Draft(self.site.name, units)
        chunks = 3 if self.fused and not self.by_head else 1
        for role, path, layer, each in self.layers():
            draft.rows(role, path, layer, each, chunks)
        draft.columns("consumer_weight", self.names[3], self.consumer, self.columns)
        draft.attributes.extend(count.plus(units // self.site.granularity) for count in self.counts)
        return draft.plan()

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the host's own layers: q, k and v, (batch, time, heads * head_dim) each."""
        if not self.fused:
            return self.producer(x), self.key(x), self.value(x)
        made = self.producer(x)  # (batch, time, 3 * heads * head_dim)
        if self.by_head:  # (…, heads, 3, head_dim)
            each = [p.flatten(-2) for p in made.unflatten(-1, (-1, 3, self.site.granularity)).unbind(-2)]
        else:
            each = list(made.chunk(3, -1))
        q, k, v = (each[place] for place in self.order)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, training: bool) -> Tensor:
        """Run attention on (batch, time, heads * head_dim); written out, so that it runs under vmap."""
        # (batch, heads, time, head_dim)
        q, k, v = (t.unflatten(-1, (-1, self.site.granularity)).transpose(1, 2) for t in (q, k, v))
        if self.group > 1:
            k, v = (t.repeat_interleave(self.group, 1) for t in (k, v))
        scores = q @ k.transpose(-2, -1) * self.scale  # (batch, heads, time, time)
        if self.causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        weights = F.dropout(scores.softmax(-1), self.dropout, training)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)  # (batch, time, heads * head_dim)


class HeadsKernel(HostKernel[HeadsPair]):
    """New heads; the rows and columns of a unit stand together, and go to their places when laid.

    Args:
        pair: Pair in which they will live.
        units: Number of channels; a multiple of head_dim.
    """

    def __init__(self, pair: HeadsPair, units: int) -> None:
        super().__init__(pair, units)
        for role, _, layer, each in pair.layers():
            self.draw(role, layer, each)
        self.columns()
        self.axes = self.along()

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        """Map what q reads to what the heads add to the output of the layer behind, or to its input."""
        pair, size = self.pair, self.pair.site.granularity
        made = [
            affine(layer, x, getattr(self, f"{role}_weight"), getattr(self, f"{role}_bias"))
            for role, _, layer, _ in pair.layers()
        ]
        if pair.fused:
            each = made[0].unflatten(-1, (self.units, 3)).unbind(-1)  # (batch, time, units) each
            q, k, v = (each[place] for place in pair.order)
        else:
            q, k, v = made
            q = exchanged(q, -1, size, pair.group)
        h = exchanged(pair.attend(q, k, v, pair.producer.training), -1, pair.group, size)
        return h if hidden else affine(pair.consumer, h, self.consumer_weight, None)

    def lay(self, edit: WidenEdit, tensor: Tensor) -> Tensor:
        """Put a unit's rows, or columns, where the host has them."""
        size = self.units if edit.chunks > 1 else self.pair.site.granularity
        each = self.pair.columns if edit.source == "consumer_weight" else self.pair.rows
        each = 1 if edit.source[:3] in {"key", "val"} else each
        return super().lay(edit, exchanged(tensor, self.axes[edit.source], size, each))


def exchanged(tensor: Tensor, axis: int, one: int, two: int) -> Tensor:
    """Exchange the order of two factors of an axis: (…, n * one * two, …) -> (…, n * two * one, …)."""
    if one == 1 or two == 1:
        return tensor
    axis %= tensor.dim()
    return tensor.unflatten(axis, (-1, one, two)).transpose(axis + 1, axis + 2).flatten(axis, axis + 2)
