"""Heads of self-attention: q, k and v read one input, plain softmax attention, one layer behind.

A new head is head_dim rows in q, k and v and as many columns in the layer behind; with those columns at zero
the output does not move. A unit is one channel, so that starts and scores work as for any pair; widths grow
by whole heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.contracts import Site, WidenEdit, WidenPlan
from esper.kasmina.pairs import edit, unit_parameters
from esper.kasmina.widen import HostKernel, affine

ROLES = ("producer", "key", "value")


@dataclass(frozen=True)
class Count:
    """A number of the user's own modules that grows with the heads."""

    path: str
    module: nn.Module
    attribute: str
    per_head: int  # 1, or head_dim where it counts the inner width

    def plus(self, heads: int) -> tuple[str, str, int]:
        """Return (module, attribute, value with more heads)."""
        return self.path, self.attribute, getattr(self.module, self.attribute) + heads * self.per_head


@dataclass(frozen=True)
class HeadsPair:
    """A site with the host's own modules at hand; a unit is one channel, widths grow by whole heads."""

    site: Site
    names: tuple[str, str, str, str]  # q, k, v, the layer behind
    producer: Any  # q
    key: Any
    value: Any
    consumer: Any
    causal: bool
    scale: float
    dropout: float  # on the attention weights, in training
    counts: tuple[Count, ...]
    time: int  # positions per example in the probe, for FLOPs
    columns: int = 1

    @property
    def port(self) -> Literal["parallel"]:
        """New heads read what q, k and v read."""
        return "parallel"

    def ends(self) -> tuple[nn.Module, nn.Module]:
        """Return q and the layer behind."""
        return self.producer, self.consumer

    def kernel(self, units: int) -> HeadsKernel:
        """Build new heads; the columns of the layer behind are zero."""
        return HeadsKernel(self, units)

    def layers(self) -> tuple[tuple[str, str, Any], ...]:
        """List (role, path, layer) of q, k and v."""
        return tuple(zip(ROLES, self.names, (self.producer, self.key, self.value), strict=False))

    def refreshed(self) -> HeadsPair:
        """Return the pair with its layers' facts as they are now."""
        parameters = sum(unit_parameters(layer) for _, _, layer in self.layers()) + self.consumer.out_features
        rows = 3 * self.producer.in_features + self.consumer.out_features
        flops = 2 * self.time * (rows + 2 * self.time)
        site = replace(
            self.site, width=self.producer.out_features, unit_parameters=parameters, unit_flops=flops
        )
        return replace(self, site=site)

    def plan(self, units: int) -> WidenPlan:
        """Write down what grows when ``units`` channels are added."""
        edits: list[WidenEdit] = []
        attributes: list[tuple[str, str, int]] = []
        for role, path, layer in self.layers():
            edits.append(edit(f"{path}.weight", 0, layer.weight, units, f"{role}_weight"))
            if layer.bias is not None:
                edits.append(edit(f"{path}.bias", 0, layer.bias, units, f"{role}_bias"))
            attributes.append((path, "out_features", layer.out_features + units))
        behind = self.names[3]
        edits.append(edit(f"{behind}.weight", 1, self.consumer.weight, units, "consumer_weight"))
        attributes.append((behind, "in_features", self.consumer.in_features + units))
        heads = units // self.site.granularity
        attributes.extend(count.plus(heads) for count in self.counts)
        return WidenPlan(self.site.name, units, tuple(edits), tuple(attributes))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, training: bool) -> Tensor:
        """Run attention on (batch, time, heads * head_dim); written out, so that it runs under vmap."""
        q, k, v = (t.unflatten(-1, (-1, self.site.granularity)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) * self.scale  # (batch, heads, time, time)
        if self.causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(ahead, -math.inf)
        weights = F.dropout(scores.softmax(-1), self.dropout, training)
        return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


class HeadsKernel(HostKernel[HeadsPair]):
    """New heads.

    Args:
        pair: Where they will live.
        units: How many channels; a multiple of head_dim.
    """

    def __init__(self, pair: HeadsPair, units: int) -> None:
        super().__init__(pair, units)
        for role, _, layer in pair.layers():
            self.draw(role, layer)
        self.columns()
        self.axes = self.along()

    def forward(self, x: Tensor, hidden: bool = False) -> Tensor:
        """Map what q reads to what the heads add to the output of the layer behind, or to its input."""
        q, k, v = (
            affine(layer, x, getattr(self, f"{role}_weight"), getattr(self, f"{role}_bias"))
            for role, _, layer in self.pair.layers()
        )
        h = self.pair.attend(q, k, v, self.pair.producer.training)
        return h if hidden else affine(self.pair.consumer, h, self.consumer_weight, None)
