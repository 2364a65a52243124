"""Re-open a saturated host: new units get no gradient from a loss that is already satisfied.

``"output"`` multiplies the output layer by 0.3: every argmax stays, the loss rises, and gradients come back.
``"shrink"`` multiplies all weights and clears the optimizer's moments (shrink and perturb, Ash & Adams,
arXiv:1910.08475). Both are for cross-entropy: what a loss of equal logits costs tells it apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from esper.kasmina.widths.layers import is_layer, weight_of
from esper.surgery.isolation.seam import look_through

TEMPER = 0.3  # of the output layer; measured on digits and letter beside 0.1 and 0.5
SATURATED = 0.25  # of the loss of equal logits: below it a host is saturated
EQUAL = 1e-3  # relative: how near a loss at zero logits comes to the logarithm of the classes
How = Literal["output", "shrink", "no"]


def output_layers(model: nn.Module, run: Callable[[], Tensor]) -> list[nn.Module]:
    """Return the layer behind which nothing has weights: the last that a pass calls, if it does so once."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return []  # they take no hooks, so it is not known which layer is the last
    called: list[nn.Module] = []

    def note(module: nn.Module, given: object, made: object) -> None:
        called.append(module)

    handles = [
        module.register_forward_hook(note)
        for module in model.modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    once = sum(module is called[-1] for module in called) == 1 if called else False
    return called[-1:] if once and is_layer(called[-1]) else []


class Tempered:
    """A gateway behind the output layer that multiplies what it gives; its weights stay as they are."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def enter(self, x: Tensor | None) -> None:
        """Let inputs pass."""

    def leave(self, y: Tensor) -> Tensor:
        """Multiply."""
        return y * self.factor


@contextmanager
def tempered(layers: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Let layers give a multiple of their output for a few passes."""
    closers = [look_through(layer, "exit", Tempered(factor)) for layer in layers]
    try:
        yield
    finally:
        for close in closers:
            close()


def multipliable(model: nn.Module, layers: Sequence[nn.Module]) -> bool:
    """Tell whether multiplying the weights of layers multiplies their output, and nothing else of the model.

    A weight tied to the embeddings would change what the output layer reads; a normalised one has no scale;
    one that stands still would never grow back.
    """
    for layer in layers:
        own = dict(layer.named_parameters(recurse=False))
        if own.get("weight") is None or not own.keys() <= {"weight", "bias"}:
            return False
        if not all(parameter.requires_grad for parameter in own.values()):
            return False
        mine = {id(parameter) for parameter in own.values()}
        for module in model.modules():
            if module is not layer and mine & {id(p) for p in module.parameters(recurse=False)}:
                return False
    return True


def multiply(layers: Sequence[nn.Module], factor: float) -> None:
    """Multiply the weights of layers for good."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters(recurse=False):
                parameter.mul_(factor)


def guess(layers: Sequence[nn.Module], run: Callable[[], Tensor]) -> float | None:
    """Return the loss of equal logits where it is that of cross-entropy, else None."""
    if len(layers) != 1:
        return None
    with tempered(layers, 0.0), torch.no_grad():
        loss = float(run())
    outputs = len(weight_of(layers[0]))
    for classes in (outputs, 2):
        if classes > 1 and abs(loss - math.log(classes)) <= EQUAL * math.log(classes):
            return loss
    return None
