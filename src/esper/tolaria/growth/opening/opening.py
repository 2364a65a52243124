"""The first look at a model: which loss, which held-out batches, which places."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from esper.batches.axes import Axes
from esper.batches.examples import LossFunction, PerExample
from esper.batches.heldout import Turned, bundled, differentiable
from esper.errors import EsperError, LossError, ProbeError
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.gate import check_probe
from esper.kasmina.recording.first import at_first, companions_noted
from esper.surgery.isolation.contexts import examining, untouched
from esper.tolaria.growth.opening.entrance import (
    Handing,
    as_needed,
    failing,
    first_probe,
    refuse_one_batch,
    refuse_uneven,
)
from esper.tolaria.growth.opening.inner_gradients import Differentiating

Find = Callable[[LossFunction, object], MorphableModel]  # with a loss, on a batch


@dataclass(frozen=True)
class Opening:
    """What the first look has found."""

    model: MorphableModel
    loss_fn: LossFunction
    held: Iterable[object]
    batch: object  # the first of them
    notes: list[str]  # to be told at the start


class Noted:
    """A loss that notes whether it can be trained by."""

    def __init__(self, loss_fn: LossFunction) -> None:
        self.loss_fn, self.trains, self.asked, self.reentrant = loss_fn, False, False, False

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        """Return the loss."""
        loss = self.loss_fn(model, batch)
        self.trains = self.trains or loss.requires_grad
        self.asked = self.asked or torch.is_grad_enabled()
        self.reentrant = self.reentrant or reentrant(loss)
        return loss


def opened(
    host: nn.Module,
    loss_fn: LossFunction,
    per_example: PerExample | None,
    held: Iterable[object],
    find: Find,
    axes: Axes,
) -> Opening:
    """Look at a model by the first held-out batch; by several at once where each is one example and fails.

    BatchNorm cannot train on one example.

    Raises:
        ProbeError: The probe cannot be used, or the model or loss does not run on it.
        LossError: The loss is not a scalar with a gradient.
        SiteError: No place can grow.
    """
    refuse_one_batch(held)
    check_probe(held)
    held = axes.begin(differentiable(held))
    try:
        return look(host, loss_fn, per_example, held, find, axes)
    except ProbeError as error:
        several = bundled(held)
        if several is None:
            raise
        try:
            return look(host, loss_fn, per_example, several, find, axes)
        except EsperError:
            raise error from error.__cause__


def look(
    host: nn.Module,
    loss_fn: LossFunction,
    per_example: PerExample | None,
    held: Iterable[object],
    find: Find,
    axes: Axes,
) -> Opening:
    """Look at a model by a probe's first batch."""
    with at_first(host):
        with companions_noted(host):
            handing = Handing(loss_fn, axes)
            loss_fn = as_needed(handing, host, held)
            batch = first_probe(held, host, loss_fn)
            if axes.settle(batch, partial(loss_of, host, loss_fn)):
                held, batch = Turned(held, axes.inward), axes.inward(batch)
            refuse_uneven(per_example, host, batch)
        noted = Noted(loss_fn)
        what = "the model, run in training and evaluation on the first probe batch to find places, raised"
        with failing(what):
            try:
                model = find(noted, batch)
            except RuntimeError as error:
                noted, model = found_with_gradients(loss_fn, batch, find, error)
                loss_fn = noted.loss_fn
            if not noted.asked:  # stacks alone are looked for without gradients
                with untouched(host, seed=0, gather=True):
                    noted(host, batch)
    if not noted.trains:
        raise LossError(
            "the loss has no gradient: it is detached, computed under no_grad, or reaches no trainable "
            "parameter; loss_fn(model, batch) must return what the loop calls backward() on"
        )
    if noted.reentrant:
        raise ProbeError(
            "the model runs under reentrant checkpointing, whose inner gradients nobody can ask for: call "
            "torch.utils.checkpoint with use_reentrant=False (Hugging Face: gradient_checkpointing_enable("
            'gradient_checkpointing_kwargs={"use_reentrant": False}))'
        )
    return Opening(model, loss_fn, held, batch, [*axes.said, *handing.notes()])


def loss_of(host: nn.Module, loss_fn: LossFunction, batch: object) -> float:
    """Return what a batch loses, the same whenever it is asked."""
    with examining(host, 0):
        return float(loss_fn(host, batch))


def found_with_gradients(
    loss_fn: LossFunction, batch: object, find: Find, error: RuntimeError
) -> tuple[Noted, MorphableModel]:
    """Look for places with a loss that takes gradients inside itself in training only, as it may have seemed.

    Raises:
        RuntimeError: It is not that; the one given.
    """
    if isinstance(loss_fn, Differentiating):
        raise error
    noted = Noted(Differentiating(loss_fn))
    try:
        return noted, find(noted, batch)
    except RuntimeError:
        raise error from None


def reentrant(loss: Tensor) -> bool:
    """Tell a loss that was reached through ``torch.utils.checkpoint`` with ``use_reentrant=True``."""
    ahead, seen = [loss.grad_fn], set[object]()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        ahead += [following for following, _ in node.next_functions]
    return False
