"""Example sizes of a signature: what goes in and what must come out, by the convolution's own formula."""

from __future__ import annotations

from esper.contracts import Signature
from esper.errors import BlueprintError

MAX_STRIDE = 16
MAX_WINDOW = 64  # kernel size, dilation and padding each
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def example_shapes(signature: Signature) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return pairs of a kernel's input shape and the output shape it must have.

    At least two, never square; beside a strided convolution one for every remainder, because a kernel
    may agree with it on even sizes and be one pixel off on odd ones.

    Raises:
        BlueprintError: No site has such a signature.
    """
    check_signature(signature)
    c, d = signature.inputs, signature.outputs
    if signature.layout == "vector":
        return [((2, c), (2, d)), ((3, c), (3, d))]
    if signature.layout == "sequence":
        return [((2, 5, c), (2, 5, d)), ((3, 8, c), (3, 8, d))]
    least = max([7, *(extent(signature, axis) + 2 for axis in range(len(signature.kernel_size)))])
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for more in range(max(2, *signature.stride) if signature.stride else 2):
        h, w = least + more, least + 3 + more
        shapes.append(
            ((2 + more, c, h, w), (2 + more, d, site_size(signature, 0, h), site_size(signature, 1, w)))
        )
    return shapes


def extent(signature: Signature, axis: int) -> int:
    """Return how far the site's convolution reaches along one axis."""
    return signature.dilation[axis] * (signature.kernel_size[axis] - 1) + 1


def site_size(signature: Signature, axis: int, size: int) -> int:
    """Return the site's output size along one axis; unchanged where there is no convolution."""
    if not signature.kernel_size:
        return size
    return conv_size(
        size,
        signature.kernel_size[axis],
        signature.stride[axis],
        signature.padding[axis],
        signature.dilation[axis],
    )


def conv_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Return a convolution's output size along one axis, in pixels.

    Args:
        size: Input size, in pixels.
        kernel: Kernel size, in pixels.
        stride: Pixels between windows.
        padding: Pixels at either end.
        dilation: Pixels between the kernel's own.
    """
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def check_signature(signature: Signature) -> None:
    """Refuse a signature no site can have.

    Raises:
        BlueprintError: With the field and its value.
    """
    if fault := signature_fault(signature):
        raise BlueprintError(f"no kernel fits {signature}: {fault}")


def signature_fault(signature: Signature) -> str | None:
    """Say why no site can have this signature; None if one can."""
    if signature.layout not in ("vector", "sequence", "image"):
        return f"the layout {signature.layout!r} is unknown"
    if signature.port not in ("parallel", "serial"):
        return f"the port {signature.port!r} is unknown"
    for name, size in (
        ("inputs", signature.inputs),
        ("outputs", signature.outputs),
        ("groups", signature.groups),
    ):
        if not 1 <= size <= 65_536:
            return f"{name} must lie in 1…65536"
    if signature.port == "serial" and signature.inputs != signature.outputs:
        return "a serial kernel reads what it is added to, so inputs and outputs must be equal"
    if signature.kernel_size:
        return _geometry_fault(signature)
    if signature.stride or signature.padding or signature.dilation or signature.groups != 1:
        return "a geometry without a kernel_size"
    return None if signature.padding_mode == "zeros" else "a padding_mode without a kernel_size"


def _geometry_fault(signature: Signature) -> str | None:
    if signature.layout != "image" or signature.port != "parallel":
        return "only a kernel parallel to a convolution over images has a geometry"
    fields = ("kernel_size", "stride", "padding", "dilation")
    parts = [getattr(signature, name) for name in fields]
    if any(len(part) != 2 for part in parts):
        return f"{', '.join(fields)} must have two entries each"
    lowest, highest = (1, 1, 0, 1), (MAX_WINDOW, MAX_STRIDE, MAX_WINDOW, MAX_WINDOW)
    for name, part, low, high in zip(fields, parts, lowest, highest, strict=True):
        if not all(low <= size <= high for size in part):
            return f"{name} must lie in {low}…{high}"
    if signature.inputs % signature.groups or signature.outputs % signature.groups:
        return "groups must divide inputs and outputs"
    if signature.padding_mode not in PADDING_MODES:
        return f"padding_mode must be one of {', '.join(PADDING_MODES)}"
    return None
