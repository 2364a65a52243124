"""Build a kernel for a place that has changed since the kernel was made."""

from __future__ import annotations

import torch

from esper.blueprints.kernel import LiveKernel
from esper.kasmina.widths.places import WidenPlace
from esper.kasmina.widths.widen import HostKernel, Widenable
from esper.surgery.isolation.contexts import same_randomness


def fitted(place: WidenPlace, given: LiveKernel, units: int) -> HostKernel[Widenable]:
    """Build a kernel of a place's present shapes from one made before its neighbours grew.

    Args:
        place: Place as it is now.
        given: Kernel whose units are used, the first ones where fewer are asked for.
        units: Number of units.
    """
    with same_randomness(0):  # what it draws is overwritten; the user's stream stays where it is
        kernel = place.kernel(units)
    assert isinstance(kernel, HostKernel)
    tensors = {**dict(given.named_parameters()), **dict(given.named_buffers())}
    with torch.no_grad():
        for name, own in (*kernel.named_parameters(), *kernel.named_buffers()):
            if name in kernel.outgoing:
                continue
            old = tensors[name]
            own.zero_()
            window = tuple(slice(0, min(a, b)) for a, b in zip(own.shape, old.shape, strict=True))
            own[window] = old[window]
    return kernel
