"""``failing_kernel``: a kernel that is being tried raises, or gives NaN."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.chaos.child import Child
from esper.chaos.fault import Fault, Seen, Verdict
from esper.contracts import Stage

__all__ = ["FailingKernel"]


class FailingKernel(Fault):
    """Breaks the first kernel that is exposed: its passes raise and give NaN in turn."""

    about = "an exposed kernel raises, then gives NaN, then raises"
    different = "the kernel was dropped, the run grew another way"

    def absent(self, whole: Seen) -> str | None:
        """Tell a run in which no kernel is ever exposed."""
        exposed = [m for m in whole.events("stage") if m["data"]["target"] == Stage.GRAFTING.name]
        return None if exposed else "no kernel was exposed in the uninterrupted run"

    def arm(self, child: Child) -> None:
        """Look for a kernel after every step, and hang the failure on it."""

        def look(step: int) -> None:
            for trial in child.armed.growth.run.orchestrator.exposed[:1] if not child.struck else []:
                child.strike(f"the kernel at {trial.origin.site} fails")
                trial.kernel.register_forward_hook(Failure())

        child.each(look)

    def judge(self, seen: Seen) -> Verdict:
        """Judge by the faults that were counted: the third drops the kernel."""
        faults = [mark["data"]["error"] for mark in seen.events("fault")]
        used = [mark for mark in seen.events("fallback") if mark["data"]["what"] == "kernel"]
        culled = [m for m in seen.events("stage") if m["data"]["target"] == Stage.CULLED.name and faults]
        struck = seen.struck
        if struck is None:
            return Verdict(False, "no kernel was exposed")
        dropped = [mark for mark in culled if mark["step"] > struck["step"]]
        what = f"{struck['what']}; {len(faults)} faults ({', '.join(dict.fromkeys(faults))})"
        what += f"; the host's own output was used {len(used)} times"
        well = len(faults) >= 3 and len(used) == len(faults) and bool(dropped)
        return Verdict(well, f"{what}; {'culled' if dropped else 'not culled'}")


class Failure:
    """A forward hook that breaks what a module gives: the odd passes raise, the even ones are not finite."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, module: object, given: object, output: Tensor) -> Tensor:
        """Break one pass."""
        self.passes += 1
        if self.passes % 2:
            return output.mm(torch.zeros(0, 0))  # raises RuntimeError, as a kernel of wrong shape does
        return output * torch.nan
