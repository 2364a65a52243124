"""Check what the user gives to ``grow`` before anything is touched."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from esper.batches.axes import Axes
from esper.batches.examples import LossFunction, PerExample, count_examples, own, refuse_layouts
from esper.batches.heldout import first
from esper.batches.layout import flatten, unflatten
from esper.errors import EsperError, LossError, ProbeError, SiteError
from esper.kasmina.race.gate import check_probe
from esper.surgery.isolation.contexts import examining, same_generators
from esper.surgery.isolation.surroundings import Surroundings
from esper.tolaria.growth.opening.inner_gradients import (
    Differentiating,
    Graphs,
    as_in_training,
    asked_in_training,
)

COPIED = 8  # calls of a loss: by then it has run in training and in evaluation


def refuse_host(model: nn.Module) -> None:
    """Refuse models that cannot be grown as they are.

    Raises:
        SiteError: With what to give instead.
    """
    if not isinstance(model, nn.Module):
        raise SiteError(f"a {type(model).__name__} cannot grow; an nn.Module is needed")
    if isinstance(model, torch.jit.ScriptModule):
        raise SiteError("a ScriptModule cannot grow; give the eager module it was made from")
    if isinstance(model, nn.DataParallel):
        raise SiteError(
            "DataParallel copies the model at every pass; give the module inside it (model.module)"
        )
    for name, module in model.named_modules():
        owned = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(is_lazy(tensor) for tensor in owned):
            raise SiteError(
                f"{name or 'the model'} is a lazy module without parameters yet; run one batch first"
            )
    if not any(p.requires_grad for p in model.parameters()):
        raise SiteError("the model has no trainable parameter; growth has nothing to learn with")


class Handing:
    """A loss that is handed containers of its own: it may take the labels out of a batch, or put more in.

    What it writes to besides, a history or a counter, shows the user's own calls only. Tensors are copied for
    the first calls, and for good where the loss has written to one.

    Args:
        loss_fn: The user's.
        axes: What lays batches out as the user's code knows them.
    """

    def __init__(self, loss_fn: LossFunction, axes: Axes) -> None:
        self.loss_fn, self.left, self.writes, self.axes = loss_fn, COPIED, False, axes
        self.around: Surroundings | None = None  # what it reaches besides: known once it has a model

    def __call__(self, model: nn.Module, batch: object) -> Tensor:
        """Return what the loss gives of such a batch."""
        leaves, nest = flatten(batch)
        leaves = self.axes.outward(leaves, nest)
        if self.writes or self.left:
            self.left = max(self.left - 1, 0)
            leaves = [
                own(leaf) if isinstance(leaf, (Tensor, np.ndarray, list, tuple)) else leaf for leaf in leaves
            ]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
        before = [(leaf._version, leaf.requires_grad) for leaf in tensors]
        if self.around is None:
            self.around = Surroundings(self.loss_fn, model)
        try:
            with self.around.same():
                return self.loss_fn(model, unflatten(leaves, nest))
        finally:
            now = [(leaf._version, leaf.requires_grad) for leaf in tensors]
            self.writes = self.writes or before != now

    def notes(self) -> list[str]:
        """Say what cannot be put back after Esper's own calls."""
        lost = [] if self.around is None else list(self.around.lost)
        return [
            f"loss_fn uses {', '.join(lost)}: what Esper's own calls of it take from there, or write, cannot "
            "be put back; keep it out of loss_fn, or let the loop do it"
        ][: len(lost)]


def as_needed(loss_fn: LossFunction, model: nn.Module, probe: Iterable[object]) -> LossFunction:
    """Return the loss, so that it has the gradients it takes inside itself wherever it is called.

    Under ``no_grad`` it would have none, and in evaluation mode a model may keep no graph behind them.
    """
    check_probe(probe)
    fails, seen = False, Graphs()
    with same_generators(probe), examining(model):
        batch = next(iter(first(probe, 1)), None)
        try:
            with seen:
                loss_fn(model, batch)
        except RuntimeError:
            fails = True
        except Exception:  # it does not run at all, for which there are better words
            return loss_fn
        if not fails and not seen.asked:
            return loss_fn
        seen = Graphs()
        try:
            with seen:
                Differentiating(loss_fn)(model, batch)
        except Exception:  # likewise
            return loss_fn
    graphs = as_in_training(seen.asked, asked_in_training(model, loss_fn, batch)) if seen.asked else []
    return Differentiating(loss_fn, graphs) if fails or graphs != seen.asked else loss_fn


@contextmanager
def failing(what: str, hint: str = "") -> Iterator[None]:
    """Tell an error of the user's model, loss or probe as one; Esper's own pass.

    Raises:
        ProbeError: With what raised, and the error.
    """
    try:
        yield
    except EsperError:
        raise
    except Exception as error:  # it is the user's code that runs here: it raises what it likes
        raise ProbeError(f"{what}: {type(error).__name__}: {error}{hint}") from error


def first_probe(probe: Iterable[object], model: nn.Module, loss_fn: LossFunction) -> object:
    """Return the probe's first batch after a trial run.

    Raises:
        ProbeError: Empty, one-shot, or it does not run.
        LossError: The loss is not a scalar.
    """
    check_probe(probe)
    batch = next(iter(first(probe, 1)), None)
    if batch is None:
        raise ProbeError("the probe can be read only once; give a list of batches or a DataLoader")
    failed = failing("loss_fn(model, batch) does not run on the first probe batch", as_one(probe))
    with examining(model), failed:
        loss = loss_fn(model, batch)
    check_loss(loss)
    if loss.dim():
        raise LossError(
            f"the loss has shape {tuple(loss.shape)}; a scalar without axes is needed: return its mean()"
        )
    refuse_layouts(batch)
    if count_examples(batch) == 0:
        raise ProbeError("the first probe batch has no examples; growth needs held-out examples as evidence")
    return batch


def refuse_one_batch(probe: object) -> None:
    """Refuse a probe that is one batch where batches are meant: its parts would be read as batches.

    Raises:
        ProbeError: With what to give.
    """
    members = list(probe) if isinstance(probe, (tuple, list)) else []
    parts = [part for part in members if isinstance(part, Tensor)]
    kinds = {(part.dtype, part.shape[1:]) for part in parts}
    whole = bool(parts) and len(parts) == len(members)
    table = isinstance(probe, (Tensor, np.ndarray)) and probe.ndim <= 2  # its rows would be batches
    if table or isinstance(probe, Mapping) or (whole and len(kinds) > 1):
        raise ProbeError(
            f"the probe is a {type(probe).__name__} that looks like one batch: its parts would be read as "
            "batches; give a list of batches, [batch] where there is one"
        )


def as_one(probe: object) -> str:
    """Say, as the end of an error message, that a probe may be one batch where batches are meant."""
    tensors = isinstance(probe, Tensor) or (
        isinstance(probe, (tuple, list)) and any(isinstance(part, Tensor) for part in probe)
    )
    return "; is the probe one batch? give a list of batches, [batch] where there is one" if tensors else ""


def held_out(probe: Iterable[object] | str, example: object) -> Iterable[object]:
    """Return the held-out batches; where the stream is its own probe, the example stands for them at first.

    Raises:
        ProbeError: Another word than "stream", or no example beside it.
    """
    if not isinstance(probe, str):
        return probe
    if probe != "stream":
        raise ProbeError(f"probe={probe!r}; give held-out batches, or 'stream' where each is seen once")
    if example is None:
        raise ProbeError(
            "probe='stream' leaves no batch to find the places with; pass example=, a batch like the loop's"
        )
    return [example]


def refuse_uneven(per_example: PerExample | None, model: nn.Module, batch: object) -> None:
    """Refuse a ``per_example`` that does not give one loss per example.

    Raises:
        LossError: With what it gave.
        ProbeError: It does not run.
    """
    if per_example is None:
        return
    with failing("per_example(model, batch) does not run on the first probe batch"), examining(model):
        losses = per_example(model, batch)
    wanted = count_examples(batch)
    if not isinstance(losses, Tensor) or losses.shape != (wanted,) or not losses.is_floating_point():
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise LossError(
            f"per_example(model, batch) gave {found}; {wanted} losses are needed, one per example"
        )


def check_loss(loss: object) -> None:
    """Refuse what is not a scalar loss.

    Raises:
        LossError: With what was given.
    """
    if not isinstance(loss, Tensor):
        raise LossError(
            f"the loss is a {type(loss).__name__}; loss_fn(model, batch) must return a scalar tensor"
        )
    if loss.numel() != 1 or not loss.is_floating_point():
        raise LossError(
            f"the loss has shape {tuple(loss.shape)} and dtype {loss.dtype}; "
            "a floating-point scalar is needed, for example its mean"
        )


def check_finite(value: float, step: int) -> None:
    """Refuse a loss that is not finite.

    Raises:
        LossError: With the step.
    """
    if not math.isfinite(value):
        raise LossError(
            f"the loss is {value} at step {step}; lower the learning rate, clip gradients or check the data"
        )
