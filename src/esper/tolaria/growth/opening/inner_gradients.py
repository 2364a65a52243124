"""A loss that takes gradients inside itself, as physics-informed ones and forces do: it has them everywhere.

A model may ask for a graph behind such a gradient only while it trains, as where forces are
``torch.autograd.grad(energy, positions, create_graph=self.training)``. Growth reads what a loss says of a
host in evaluation mode; so what is asked for in training is asked for there, too, call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from esper.batches.examples import LossFunction
from esper.surgery.isolation.attributes import modules_of
from esper.surgery.isolation.contexts import same_modes, untouched


class Graphs(TorchFunctionMode):
    """Notes which calls of ``torch.autograd.grad`` ask for a graph; lets them ask otherwise.

    Args:
        wanted: Whether each call is to get one, in order; None: as it asks.
    """

    def __init__(self, wanted: Sequence[bool] | None = None) -> None:
        super().__init__()
        self.wanted, self.asked = wanted, list[bool]()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run a call."""
        given = kwargs or {}
        if func is torch.autograd.grad:
            at = len(self.asked)
            self.asked.append(bool(given.get("create_graph", False)))
            if self.wanted is not None and at < len(self.wanted) and self.wanted[at]:
                given = {**given, "create_graph": True, "retain_graph": True}
        return func(*args, **given)


class Differentiating:
    """A loss that has gradients wherever it is called.

    Args:
        loss_fn: The user's.
        graphs: Whether each gradient it takes is to have a graph behind it; empty: as it asks.
    """

    def __init__(self, loss_fn: LossFunction, graphs: Sequence[bool] = ()) -> None:
        self.loss_fn, self.graphs = loss_fn, graphs

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        """Return the loss, detached where the caller wants no gradient."""
        if torch.is_grad_enabled():
            with Graphs(self.graphs) if any(self.graphs) else nullcontext():
                return self.loss_fn(model, batch)
        with torch.enable_grad():
            return self.loss_fn(model, batch).detach()


def asked_in_training(model: nn.Module, loss_fn: LossFunction, batch: object) -> list[bool]:
    """Return which gradients inside a loss have a graph behind them in training; none where it does not run.

    Nothing of the model is touched.
    """
    with same_modes(model):
        for module in modules_of(model):
            module.training = True
        with untouched(model, seed=0), torch.enable_grad(), Graphs() as seen:
            try:
                loss_fn(model, batch)
            except Exception:  # one example and BatchNorm, say; what does not run is told by who needs it
                return []
    return seen.asked


def as_in_training(asked: Sequence[bool], training: Sequence[bool]) -> list[bool]:
    """Return which gradients are to have a graph in evaluation; none where it is not told by training.

    Args:
        asked: What each call asks for in evaluation.
        training: The same in training.
    """
    if len(asked) == len(training):
        return list(training)
    return [True] * len(asked) if training and all(training) else []
