"""From the tensors seen at a place to the signature a kernel must fit there; a mismatch is refused."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from esper.contracts import Signature

LAYOUTS: dict[int, Literal["vector", "sequence", "image"]] = {2: "vector", 3: "sequence", 4: "image"}
CHANNELS_SECOND = (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, nn.InstanceNorm1d)  # (batch, c, time)


def signatures(
    ends: tuple[nn.Module, nn.Module], x: Tensor | None, y: Tensor, unread: str, examples: int
) -> dict[str, Signature | str]:
    """Return the signature of each port, or the reason there is none.

    Args:
        ends: The place.
        x: Input, (batch, …); None where that was no floating-point tensor.
        y: Output, (batch, …).
        unread: Why a kernel cannot read ``x``; "" where it can.
        examples: Examples in that pass.
    """
    layout = LAYOUTS.get(y.dim())
    reason = None
    if layout is None:
        reason = f"its output has {y.dim()} axes; blueprints know vectors, sequences and images"
    elif y.shape[0] != examples:
        reason = f"axis 0 of its output has {y.shape[0]} entries for {examples} examples"
    elif layout == "sequence" and any(isinstance(m, CHANNELS_SECOND) for end in ends for m in end.modules()):
        reason = "its output is (batch, channels, time); blueprints know (batch, time, channels)"
    if reason is not None or layout is None:
        return {"parallel": reason or "", "serial": reason or ""}
    own = channels(y)
    serial = Signature(layout, "serial", own, own)
    return {"serial": serial, "parallel": beside(ends, x, y, unread, layout)}


def beside(
    ends: tuple[nn.Module, nn.Module],
    x: Tensor | None,
    y: Tensor,
    unread: str,
    layout: Literal["vector", "sequence", "image"],
) -> Signature | str:
    """Return the signature of a kernel that reads the input, or the reason none can."""
    if x is None:
        return "its input is no floating-point tensor"
    if unread:
        return unread
    if x.dim() != y.dim() or x.shape[0] != y.shape[0]:
        return f"input {tuple(x.shape)} and output {tuple(y.shape)} have different layouts"
    inputs, outputs = channels(x), channels(y)
    entry, exit_ = ends
    if isinstance(entry, nn.Conv2d) and entry is exit_:
        return along(entry, inputs, outputs)
    if sizes(x) != sizes(y):
        return f"its output is {sizes(y)} large where its input is {sizes(x)}"
    return Signature(layout, "parallel", inputs, outputs)


def along(conv: nn.Conv2d, inputs: int, outputs: int) -> Signature | str:
    """Return the signature beside a convolution, with its geometry."""
    kernel, dilation = conv.kernel_size, conv.dilation
    if isinstance(conv.padding, str):
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if conv.padding == "same" and any(t % 2 for t in total):
            return "its padding is 'same' on an even kernel, which pads one side more"
        padding = tuple(t // 2 if conv.padding == "same" else 0 for t in total)
    else:
        padding = tuple(conv.padding)
    return Signature(
        "image",
        "parallel",
        inputs,
        outputs,
        tuple(kernel),
        tuple(conv.stride),
        padding,
        tuple(dilation),
        conv.groups,
        conv.padding_mode,
    )


def channels(tensor: Tensor) -> int:
    """Count channels: axis 1 of an image, the last one otherwise."""
    return tensor.shape[1] if tensor.dim() == 4 else tensor.shape[-1]


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """Return the axes that are neither batch nor channels."""
    return tuple(tensor.shape[2:]) if tensor.dim() == 4 else tuple(tensor.shape[1:-1])
