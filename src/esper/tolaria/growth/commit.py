"""Make a judged branch part of the user's own layers: module, optimizers and averages, or nothing at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from esper.contracts import Decision, Event, Observer, WidenPlan
from esper.errors import SurgeryError
from esper.kasmina.isolation import evaluating, untouched
from esper.kasmina.materialise import empty_slices, widen
from esper.kasmina.morphable import MorphableModel
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

    def __init__(
        self,
        model: MorphableModel,
        optimizers: Mapping[str, Optimizer],
        averages: Sequence[nn.Module],
        run: Callable[[], Any],
        rule: Literal["zeros", "seed", "mean"],
        observe: Observer,
    ) -> None:
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
        layer = self.model.awake(plan.site)
        assert layer is not None
        branch = self.output(kernel.pair.consumer)
        layer.exposed = False
        donor = {e.name: optimizer.state.get(getattr(kernel, e.source), {}) for e in plan.edits}
        try:
            difference = self.carry_out(plan, slices, donor, branch, step)
        except (SurgeryError, RuntimeError, ValueError, TypeError, IndexError) as error:
            layer.exposed = True
            return f"the wider model was put back: {error}"
        self.model.refresh()
        self.plans.append(plan)
        self.observe(
            Event(
                "widened",
                step,
                {
                    "decision": decision.id,
                    "site": plan.site,
                    "units": plan.units,
                    "edits": [[e.name, e.axis, e.old, e.new] for e in plan.edits],
                    "parameters": self.model.parameter_count(),
                    "difference": difference,
                    "milliseconds": (time.perf_counter() - begun) * 1e3,
                },
            )
        )
        return ""

    def carry_out(
        self,
        plan: WidenPlan,
        slices: Mapping[str, Tensor],
        donor: Mapping[str, Mapping[str, Any]],
        branch: Tensor | None,
        step: int,
    ) -> float:
        """Widen host, averages and optimizers; whatever raises, everything is put back.

        Returns:
            The largest difference from the branch, 0 where there is none to compare with.
        """
        with ExitStack() as back:
            widened = widen(self.model.host, plan, slices)
            back.callback(widened.undo)
            difference = 0.0
            if branch is not None:
                consumer = self.model.pairs[plan.site].consumer
                difference = self.deviation(branch, self.output(consumer))
            for average in self.averages:
                back.callback(widen_average(average, plan, slices).undo)
            reasons = widen_state(self.optimizers, widened.changes, self.rule, donor)  # all of them or none
            back.pop_all()
        for change in widened.replaced:
            lost = f"{change.edit.name} could not keep its identity ({change.why})"
            self.observe(
                Event(
                    "fallback", step, {"what": "identity", "why": f"{lost}; optimizers were repaired by name"}
                )
            )
        for line in reasons:
            self.observe(Event("fallback", step, {"what": "optimizer state", "why": line}))
        return difference

    def replay(self, plan: WidenPlan) -> None:
        """Repeat a widening of an earlier run on a fresh host; a checkpoint will fill its empty slices."""
        self.carry_out(plan, empty_slices(self.model.host, plan), {}, None, 0)
        self.model.refresh()
        self.plans.append(plan)

    def output(self, layer: nn.Module) -> Tensor:
        """Return a layer's output on the probe batch, in eval mode."""
        capture = Capture()
        close = open_seam(layer, "exit", capture)
        try:
            with evaluating(self.model), untouched(self.model.host, seed=0):
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
