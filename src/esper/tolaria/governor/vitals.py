"""What is read off a run at every step: the gradient norm, the weights' finiteness, the learning rate.

The norm is read where the optimizer is about to use the gradients, so clipping has happened and a loop that
clears them right after the step is no matter; the number itself is waited for after the step, where the loss
is read anyway. How much is read follows from what a step costs, in FLOPs, not from a clock: see
:meth:`Reading.of`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.nissa.detectors import Vitals
from esper.tolaria.governor.private_api import foreach_norm, require, values_of

DEAR = 50_000  # FLOPs of a step per number read: 0.4 ns a number out of cold memory are 0.05 % of them
CALL = 1e9  # FLOPs of a step per gradient tensor read: some 25 µs right after a step that filled the caches
WHOLE = 4096  # numbers of a tensor that are always read together
WEIGHTS = (
    8  # readings of weights until every weight has had its turn: a lost weight shows in the next loss, too
)

SELDOM = 32  # readings of gradients to one of weights
ROUNDS = 8 * WEIGHTS  # readings until the model is asked again which weights and buffers it has


@dataclass(frozen=True, slots=True)
class Reading:
    """How much of a step is read."""

    every: int = 1  # steps from one reading of the gradients to the next
    share: float = 1.0  # of every large tensor, another part at every reading
    tensors: int | None = None  # gradients at a time, evenly spaced and always the same ones; None: all

    @classmethod
    def of(cls, step_flops: float, parameters: int) -> Reading:
        """Choose by what a step costs.

        Read all at once, gradients take 250 to 400 µs behind a step that has filled the caches: 1 % of one of
        30 ms. Read on every third step, one of three gradients that are wrong for a single step is missed.
        So every step reads few tensors, always the same: a fault of the run is in all of them, one of another
        tensor shows in the next loss. One tensor per 1e9 FLOPs, and one number per 50,000: of a larger tensor
        a part that moves through it.

        Args:
            step_flops: Forward and backward, of all examples.
            parameters: Trainable numbers.
        """
        if step_flops <= 0:
            return cls()  # nobody knows
        share = min(step_flops / DEAR / max(parameters, 1), 1.0)
        return cls(1, share, max(int(step_flops / CALL), 1))


class ReadingState(TypedDict):
    """The fields of a :class:`Reading`."""

    every: int
    share: float
    tensors: int | None


class ReaderState(TypedDict):
    """Where a reader stands."""

    steps: int
    turn: int
    reading: ReadingState


class VitalsReader:
    """Reads the vital signs of a run.

    Args:
        model: Module that is the host; its buffers count as weights.
        optimizers: Optimizers, by name; they are hooked, and only the gradients they step are read.
    """

    def __init__(self, model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
        require()
        self.model, self.optimizers = model, dict(optimizers)
        self.reading = Reading()
        self.steps = self.turn = 0
        self.pending: list[Tensor] = []  # norms on their device, not waited for
        self.chosen: dict[int, list[Tensor]] = {}  # by optimizer, whose gradients are read
        self.kept: list[Tensor] = []  # weights and buffers of this round
        self.hooks = [o.register_step_pre_hook(self._before) for o in self.optimizers.values()]

    def _before(self, optimizer: Optimizer, *rest: object) -> None:
        if optimizer is next(iter(self.optimizers.values())):
            self.steps += 1
            self.pending.clear()
        if self.steps % self.reading.every:
            return
        chosen = self.chosen.get(id(optimizer))
        if chosen is None:  # walking all of them at every step takes 1 µs each
            chosen = self.chosen[id(optimizer)] = few(optimizer, self.reading.tensors)
        gradients = [g for g in (p.grad for p in chosen) if g is not None]
        given = [values_of(g) if g.is_sparse else g for g in gradients]
        self.pending += norms(given, self.reading.share, self.turn)

    def read(self, loss: float) -> Vitals:
        """Read the step that has just been done."""
        if self.steps % self.reading.every:
            return Vitals(loss, rate=self.rate())
        gradient = weights = None
        if self.pending:
            gradient = total(self.pending) / math.sqrt(self.reading.share)
            self.pending.clear()
        place, idle = divmod(self.turn % (WEIGHTS * SELDOM), SELDOM)
        if self.turn % ROUNDS == 0 or not self.kept:  # walking a model takes 100 µs
            buffers = [b for b in self.model.buffers() if b.is_floating_point()]
            self.chosen.clear()
            self.kept = [p.detach() for group in self.groups() for p in group["params"]] + buffers
        if not idle and (tensors := self.kept[place::WEIGHTS]):
            weights = math.isfinite(total(norms(tensors, self.reading.share, self.turn // WEIGHTS)))
        self.turn += 1
        return Vitals(loss, gradient, weights, self.rate())

    def rate(self) -> float:
        """Return the largest learning rate there is."""
        return max(float(group["lr"]) for group in self.groups())

    def groups(self) -> list[dict[str, Any]]:
        """List the parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def close(self) -> None:
        """Take the hooks away."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()

    def state_dict(self) -> ReaderState:
        """Return where the reading stands, and how much is read: another share would be another norm."""
        every, share, tensors = self.reading.every, self.reading.share, self.reading.tensors
        reading: ReadingState = {"every": every, "share": share, "tensors": tensors}
        return {"steps": self.steps, "turn": self.turn, "reading": reading}

    def load_state_dict(self, state: ReaderState) -> None:
        """Go on reading."""
        self.steps, self.turn = state["steps"], state["turn"]
        saved = state["reading"]
        self.reading = Reading(saved["every"], saved["share"], saved["tensors"])


def few(optimizer: Optimizer, count: int | None) -> list[Tensor]:
    """Choose the parameters whose gradients are read: evenly spaced, small ones first: uncut."""
    given = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if count is None or len(given) <= count:
        return given
    small = [p for p in given if p.numel() <= WHOLE]
    given = small if len(small) >= count else given
    return given[:: -(-len(given) // count)]


def norms(tensors: Sequence[Tensor], share: float, turn: int) -> list[Tensor]:
    """Return norms in float32, one per tensor, of the part whose turn it is; nothing is waited for."""
    parts = list(tensors) if share >= 1 else [part(t, share, turn) for t in tensors]
    return foreach_norm(parts) if parts else []


def part(tensor: Tensor, share: float, turn: int) -> Tensor:
    """Return some rows of a large tensor, others at every turn; a small one whole."""
    rows = tensor.shape[0] if tensor.dim() else 0
    if tensor.numel() <= WHOLE or rows < 2:
        return tensor
    count = max(round(share * rows), 1)
    start = turn * count % rows
    return tensor.narrow(0, start, min(count, rows - start))  # (rows, …) → (at most count, …)


def total(found: Sequence[Tensor]) -> float:
    """Return the norm of norms; the one place that waits for a device, once for each there is."""
    devices: dict[torch.device, list[Tensor]] = {}
    for norm in found:
        devices.setdefault(norm.device, []).append(norm)
    if list(devices) == [torch.device("cpu")]:  # nothing to wait for, and stacking takes longer
        return math.hypot(*(norm.item() for norm in found))
    return math.hypot(*(v for group in devices.values() for v in torch.stack(group).tolist()))
