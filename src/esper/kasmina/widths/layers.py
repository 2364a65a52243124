"""What differs between the layers that can be widened: where inputs and outputs are, how they are applied.

Kernels keep their tensors as torch's Linear does, (out, in, …); here and in ``HostKernel.lay`` they are
turned for layers whose weight is (in, out, …).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (*PLAIN, *TRANSPOSED)


def is_conv1d(layer: nn.Module) -> bool:
    """Tell Hugging Face's ``Conv1D``, a linear layer with its weight as (in, out), by what it has."""
    if not any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__):
        return False
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and getattr(layer, "nf", 0) == weight.shape[1]


def is_linear(layer: nn.Module) -> bool:
    """Tell a layer that maps the last axis."""
    return isinstance(layer, nn.Linear) or is_conv1d(layer)


def is_layer(layer: nn.Module) -> bool:
    """Tell a layer of a kind that can be widened at either end."""
    return is_linear(layer) or isinstance(layer, CONVOLUTIONS)


def is_depthwise(layer: nn.Module) -> bool:
    """Tell a convolution that keeps every channel to itself."""
    return isinstance(layer, PLAIN) and layer.groups == layer.in_channels == layer.out_channels > 1


def out_axis(layer: nn.Module) -> int:
    """Return the axis of the weight that counts outputs."""
    return int(isinstance(layer, TRANSPOSED) or is_conv1d(layer))


def in_axis(layer: nn.Module) -> int:
    """Return the axis of the weight that counts inputs."""
    return 1 - out_axis(layer)


def stored_weight(layer: nn.Module) -> Tensor:
    """Return a layer's weight as the layer has it: (out, in, …), or (in, out, …)."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def weight_of(layer: nn.Module) -> Tensor:
    """Return a layer's weight as (out, in, …): itself, or a view."""
    weight = stored_weight(layer)
    return weight if out_axis(layer) == 0 else weight.transpose(0, 1)


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return a layer's bias, (out,), None where it has none."""
    bias: Tensor | nn.Module | None = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    return bias


def out_size(layer: nn.Module) -> int:
    """Count outputs."""
    return weight_of(layer).shape[0]


def in_size(layer: nn.Module) -> int:
    """Count inputs of a layer without groups."""
    return weight_of(layer).shape[1]


def grown_outputs(path: str, layer: nn.Module, added: int) -> list[tuple[str, str, int]]:
    """List (module, attribute, value) of what counts outputs."""
    return counts(path, layer, ("out_features", "out_channels", "nf"), out_size(layer) + added)


def grown_inputs(path: str, layer: nn.Module, added: int) -> list[tuple[str, str, int]]:
    """List (module, attribute, value) of what counts inputs."""
    return counts(path, layer, ("in_features", "in_channels", "nx"), in_size(layer) + added)


def counts(path: str, layer: nn.Module, names: tuple[str, ...], value: int) -> list[tuple[str, str, int]]:
    """Give a value to those of some attributes that a layer has."""
    held = vars(layer)  # torch says at length what a module has not: getattr would take ten times as long
    return [(path, name, value) for name in names if isinstance(held.get(name), int)]


def affine(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply another weight, (out, in, …), in a layer's own way: its stride, dilation, padding and their mode.

    What was tapped under autocast may be half as wide as the weights; outside it has to be widened first.
    """
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        x = x.to(weight.dtype)
    if is_linear(layer):
        return F.linear(x, weight, bias)
    if isinstance(layer, PLAIN):
        return layer._conv_forward(x, weight, bias)
    assert isinstance(layer, TRANSPOSED) and isinstance(layer.padding, tuple)
    func = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(layer.kernel_size)]
    turned = weight.transpose(0, 1)  # (in, out, *taps)
    return func(x, turned, bias, layer.stride, layer.padding, layer.output_padding, 1, layer.dilation)


def features(model: nn.Module) -> set[int]:
    """List the numbers of inputs that linear layers of a model take."""
    return {layer.in_features for layer in model.modules() if isinstance(layer, nn.Linear)}


def coarsest(modules: Iterable[nn.Module]) -> float:
    """Return the largest step of the numbers that parameters are written in; 0 where there are none."""
    held = [p for module in modules for p in module.parameters() if p.is_floating_point()]
    return max((torch.finfo(p.dtype).eps for p in held), default=0.0)


def forward_of_its_own(module: nn.Module) -> str:
    """Return the name of a layer's class where it is a subclass with another forward; "" if it is torch's."""
    kind = type(module)
    base = next((one for one in kind.__mro__ if one.__module__.startswith("torch.nn.modules.")), kind)
    names = ("forward", "_conv_forward", "__call__")
    return kind.__name__ if any(getattr(kind, n, None) is not getattr(base, n, None) for n in names) else ""
