"""Draw the units a proof tries: as large as the host's own, and with limits that stand out from them."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from esper.contracts import WidenPlan
from esper.kasmina.widths.layers import weight_of
from esper.kasmina.widths.places import WidenPlace
from esper.kasmina.widths.widen import HostKernel, Widenable

SHARE = 8  # an eighth of the width is added, so that a number read from it shows
OUT = 1.5  # times the host's largest number


def drawn(place: WidenPlace) -> HostKernel[Widenable]:
    """Draw units that make a difference, as large as the consumers' own."""
    site = place.site
    units = site.granularity * max(1, site.width // SHARE // site.granularity)
    kernel = place.kernel(units if site.most is None else min(units, site.most))
    assert isinstance(kernel, HostKernel)
    for name, outlet in zip(kernel.outgoing, place.outlets, strict=True):
        host = weight_of(outlet.consumer).detach().float()
        size = float(host.square().mean().sqrt())
        size = size if 0 < size < math.inf else host[0].numel() ** -0.5
        getattr(kernel, name).normal_(std=size)
    return kernel


def stand_out(kernel: HostKernel[Widenable], plan: WidenPlan, host: Mapping[str, Tensor]) -> None:
    """Let new numbers of each kind be the largest and the smallest, so that a limit read from them shows.

    Args:
        kernel: Units as they were drawn.
        plan: Where they would go.
        host: Parameters of the host.
    """
    own = dict(kernel.named_parameters())
    for edit in plan.edits:
        if edit.source not in own or edit.name not in host or not host[edit.name].numel():
            continue
        most = OUT * float(host[edit.name].detach().abs().max())
        numbers = own[edit.source].view(-1)
        if 0 < most < math.inf:
            numbers[-1] = -most
            numbers[0] = most
