"""Convolution beside a site: the site's own window, a window of its own on the site's grid, or none."""

from __future__ import annotations

from esper.blueprints.building import Step, Value
from esper.blueprints.sizes import conv_size

GEOMETRIES = ("site", "window", "same")
Pair = tuple[int, int]


def conv(step: Step, x: Value) -> Value:
    """Convolve an image.

    ``geometry`` says where the window comes from. ``site``: kernel size, stride, padding, dilation and
    padding mode of the convolution at the site (``kernel`` and ``dilation`` count only where there is none).
    ``window``: its own kernel and dilation on the site's stride, centred on the site's window; refused where
    no padding centres it. ``same``: its own kernel, stride 1, size kept.
    """
    step.rank(x, 4)
    channels, groups = step.dimension("channels"), step.dimension("groups")
    if x.channels % groups or channels % groups:
        step.refuse(f"groups {groups} must divide the channels {x.channels} → {channels}")
    kernel, stride, padding, dilation, mode = _window(step)
    h, w = (conv_size(x.shape[2 + a], kernel[a], stride[a], padding[a], dilation[a]) for a in (0, 1))
    if h < 1 or w < 1:
        step.refuse(f"a {kernel[0]}×{kernel[1]} window does not fit in {x.shape[2]}×{x.shape[3]} pixels")
    weight = step.weight("weight", (channels, x.channels // groups, *kernel))  # (out, in of a group, h, w)
    bias = step.weight("bias", (channels,), "zeros") if step.attributes["bias"] else None
    if mode != "zeros" and any(padding):
        sides = (padding[1], padding[1], padding[0], padding[0])  # left, right, top, bottom
        shape = (*x.shape[:2], x.shape[2] + 2 * padding[0], x.shape[3] + 2 * padding[1])
        x, padding = step.emit("pad", x.name, sides, mode, shape=shape), (0, 0)  # (batch, in, h + …, w + …)
    return step.emit(
        "conv2d", x.name, weight, bias, stride, padding, dilation, groups, shape=(x.shape[0], channels, h, w)
    )


def _window(step: Step) -> tuple[Pair, Pair, Pair, Pair, str]:
    """Return kernel size, stride, padding, dilation and padding mode."""
    site, geometry = step.signature, step.attributes["geometry"]
    size, spread = step.integer("kernel"), step.integer("dilation")
    kernel, dilation = (size, size), (spread, spread)
    if geometry == "same" or not site.kernel_size:
        return kernel, (1, 1), _centred(step, (0, 0)), dilation, "zeros"
    own = (site.kernel_size[0], site.kernel_size[1])
    stride, padding = (site.stride[0], site.stride[1]), (site.padding[0], site.padding[1])
    spacing = (site.dilation[0], site.dilation[1])
    if geometry == "site":
        return own, stride, padding, spacing, site.padding_mode
    slack = (
        2 * padding[0] - spacing[0] * (own[0] - 1),
        2 * padding[1] - spacing[1] * (own[1] - 1),
    )
    return kernel, stride, _centred(step, slack), dilation, site.padding_mode


def _centred(step: Step, slack: Pair) -> Pair:
    """Return the padding that gives exactly the site's size.

    Args:
        step: Node that is lowered.
        slack: Pixels by which the site's padding exceeds its window, (height, width).
    """
    reach = step.integer("dilation") * (step.integer("kernel") - 1)
    twice = (slack[0] + reach, slack[1] + reach)
    if any(total < 0 or total % 2 for total in twice):
        step.refuse(
            f"no padding gives a window {reach + 1} pixels wide the site's output size "
            f"(it would be {twice[0] / 2:g} × {twice[1] / 2:g})"
        )
    return twice[0] // 2, twice[1] // 2
