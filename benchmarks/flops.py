"""One FLOP convention for every arm: 2 per multiply-add, a backward pass costs two forward passes.

Biases, activations and optimizer arithmetic are left out for all arms alike, so that a step of a network of
matrices costs 6 × parameters × examples. What growth costs beyond steps is counted per arm, in its own file.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.kasmina.recording.flops import FlopMeter

STEP = 3  # forward + backward, in forward passes


def forward_flops(net: nn.Module, examples: Tensor) -> int:
    """Count one forward pass of one example by torch's own formulas.

    Args:
        net: The network; its mode and gradients are not touched.
        examples: A batch of shape (N, ...); its first example is used.
    """
    with torch.no_grad(), FlopMeter() as meter:  # torch's own counter passes attention on the CPU over
        net(examples[:1])
    return meter.total


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())
