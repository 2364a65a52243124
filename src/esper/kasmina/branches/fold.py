"""Folds a kept kernel into the layer it stands at, where algebra allows: affine beside or behind a Linear.

``W·x + b + M·x + c`` is one layer again, and so is ``y + M·y + c`` behind it; the grown model then has no
extra launch and no extra parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.blueprints.kernel import LiveKernel
from esper.kasmina.branches.blocks import Block
from esper.surgery.isolation.seam import plain_class


def merged(place: Block, kernel: LiveKernel) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of the Linear with the kernel in it, or None where that cannot be."""
    layer = place.entry
    if not (place.graph.affine and plain_class(layer) is nn.Linear and layer is place.exit):
        return None
    assert isinstance(layer, nn.Linear)
    size = place.signature.inputs
    probe = torch.cat((torch.zeros(1, size), torch.eye(size)))  # (1 + inputs, inputs)
    probe = probe.to(layer.weight)
    rows = probe if place.signature.layout == "vector" else probe.unsqueeze(1)  # each a sequence of one
    with torch.no_grad():
        answers = kernel(rows).reshape(1 + size, -1)
        constant, matrix = answers[0], (answers[1:] - answers[0]).T  # (outputs,), (outputs, inputs)
        if layer.bias is None and bool(constant.any()):
            return None
        if place.port == "parallel":
            weight, bias = layer.weight + matrix, layer.bias
        else:
            weight = layer.weight + matrix @ layer.weight
            bias = None if layer.bias is None else layer.bias + matrix @ layer.bias
        return weight, None if bias is None else bias + constant


def write(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a layer these values, in place, as an optimizer step would."""
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
