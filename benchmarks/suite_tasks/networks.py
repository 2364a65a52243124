"""The plain networks of the suite, by their hidden widths, and the widths read back from what has grown."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from benchmarks.suite_tasks.task import Size


def mlp(inputs: int, outputs: int, widths: Size, bias: bool = True) -> nn.Sequential:
    """Build Linear and ReLU in turn, one hidden layer per width."""
    layers: list[nn.Module] = []
    for before, after in pairwise((inputs, *widths)):
        layers += [nn.Linear(before, after, bias), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], outputs, bias))


def cnn(widths: Size, normalised: bool = False) -> nn.Sequential:
    """Build the 8x8 network: two 3x3 convolutions, each pooled by 2, then one linear layer."""
    layers: list[nn.Module] = []
    for before, after in pairwise((1, *widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=not normalised)]
        layers += [nn.BatchNorm2d(after)] if normalised else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * 2 * 2, 10))


def hidden_widths(net: nn.Module) -> Size:
    """Read the hidden widths back, whatever grew: all layers but the last."""
    sizes = [len(module.weight) for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return tuple(sizes[:-1])
