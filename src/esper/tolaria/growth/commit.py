"""Make a judged branch part of the user's own layers: module, optimizers and averages together, or nothing at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.contracts import Decision, Event, Observer, WidenPlan
from esper.errors import SurgeryError
from esper.kasmina.isolation import evaluating, untouched
from esper.kasmina.materialise import Widened, widen
from esper.kasmina.morphable import MorphableModel, slug
from esper.kasmina.seam import open_seam
from esper.kasmina.widen import WidenKernel
from esper.tolaria.surgery.averages import widen_average
from esper.tolaria.surgery.optimizers import widen_state

ROUNDING = 24  # units of machine precision, times the largest output: 2e-6 · √2 in fp32


class Committer:
    """Carries out widenings.

    Args:
        model: Owns the host.
        optimizers: The user's, by name.
        averages: EMA copies of the host.
        run: One pass over a probe batch.
        rule: State of new units in the optimizers.
        observe: Told what was widened, and of every detour.
    """

    def __init__(self, model: MorphableModel, optimizers: Mapping[str, Optimizer], averages: Sequence[nn.Module], run: Callable[[], Any],
                 rule: Literal["zeros", "seed", "mean"], observe: Observer) -> None:  # fmt: skip
        self.model, self.optimizers, self.averages = model, optimizers, averages
        self.run, self.rule, self.observe = run, rule, observe
        self.plans: list[WidenPlan] = []

    def commit(self, kernel: WidenKernel, optimizer: Optimizer, decision: Decision, step: int) -> str:
        """Widen the pair a kernel stands beside.

        Returns:
            "" when it was carried out, otherwise why everything was put back.
        """
        begun = time.perf_counter()
        plan = kernel.plan()
        slices = kernel.slices(plan)
        layer = self.model.layers[slug(plan.site)]
        branch = self.output(kernel.pair.consumer)
        layer.exposed = False
        widened = widen(self.model.host, plan, slices)
        try:
            difference = self.deviation(branch, self.output(kernel.pair.consumer))
        except (SurgeryError, RuntimeError, ValueError, TypeError, IndexError) as error:
            widened.undo()
            layer.exposed = True
            return f"the wider model was put back: {error}"
        self.follow(
            widened,
            slices,
            {e.name: optimizer.state.get(getattr(kernel, e.source), {}) for e in plan.edits},
            step,
        )
        self.model.refresh()
        self.plans.append(plan)
        self.observe(Event("widened", step, {
            "decision": decision.id, "site": plan.site, "units": plan.units, "edits": [[e.name, e.axis, e.old, e.new] for e in plan.edits],
            "parameters": self.model.parameter_count(), "difference": difference, "milliseconds": (time.perf_counter() - begun) * 1e3,
        }))  # fmt: skip
        return ""

    def follow(
        self,
        widened: Widened,
        slices: Mapping[str, Tensor],
        donor: Mapping[str, Mapping[str, Any]],
        step: int,
    ) -> None:
        """Let optimizers and averages follow a widening that has been checked."""
        for change in widened.replaced:
            why = f"{change.edit.name} could not keep its identity ({change.why}); it was replaced and repaired by name"
            self.observe(Event("fallback", step, {"what": "identity", "why": why}))
        for line in widen_state(self.optimizers, widened.changes, self.rule, donor):
            self.observe(Event("fallback", step, {"what": "optimizer state", "why": line}))
        for average in self.averages:
            widen_average(average, widened.plan, slices)

    def replay(self, plan: WidenPlan) -> None:
        """Repeat a widening of an earlier run on a fresh host, with empty slices that a checkpoint will fill."""
        slices = {}
        for edit in plan.edits:
            old = self.model.host.get_parameter(edit.name) if edit.name in dict(self.model.host.named_parameters()) else self.model.host.get_buffer(edit.name)  # fmt: skip
            shape = list(old.shape)
            shape[edit.axis] = edit.new - edit.old
            slices[edit.name] = old.new_zeros(shape)
        self.follow(widen(self.model.host, plan, slices), slices, {}, 0)
        self.model.refresh()
        self.plans.append(plan)

    def output(self, layer: nn.Module) -> Tensor:
        """Return a layer's output on the probe batch, in eval mode."""
        capture = Capture()
        close = open_seam(layer, "exit", capture)
        try:
            with untouched(self.model.host, seed=0), evaluating(self.model):
                self.run()
        finally:
            close()
        if capture.y is None:
            raise SurgeryError("the probe did not reach the widened layer")
        return capture.y

    def deviation(self, branch: Tensor, wide: Tensor) -> float:
        """Return the largest difference between branch and widened form.

        Raises:
            SurgeryError: It is beyond rounding.
        """
        difference = float((branch - wide).abs().max())
        allowed = ROUNDING * torch.finfo(wide.dtype).eps * float(branch.abs().max())
        if not difference <= max(allowed, torch.finfo(wide.dtype).tiny):
            raise SurgeryError(
                f"the wider layers differ from the branch by {difference:.3g}; {allowed:.3g} is rounding"
            )
        return difference


class Capture:
    """Keeps the last output that passes a seam."""

    def __init__(self) -> None:
        self.y: Tensor | None = None

    def enter(self, x: Tensor) -> None:
        """Let inputs pass."""

    def leave(self, y: Tensor) -> Tensor:
        """Keep the output and let it pass."""
        self.y = y.detach()
        return y
