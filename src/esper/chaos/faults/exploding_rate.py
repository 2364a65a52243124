"""``exploding_rate``: the learning rate is a thousand times what it was."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from esper.chaos.child import Child
from esper.chaos.fault import GOVERNED, Fault, Seen, Verdict
from esper.chaos.faults.nan_batch import undone

__all__ = ["ExplodingRate"]

TIMES = 1000.0
LATEST = 3  # progress events


class ExplodingRate(Fault):
    """Multiplies the learning rate of every parameter group, and leaves it there."""

    about = "the learning rate times 1,000, for good"
    growth: Mapping[str, object] = GOVERNED
    different = "the governor undid steps"

    def arm(self, child: Child) -> None:
        """Set the rates of the optimizers themselves."""

        def explode() -> None:
            child.strike("learning rate × 1000")
            for optimizer in child.armed.growth.run.parts.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * TIMES

        child.once(child.spec.at, explode)

    def judge(self, seen: Seen) -> Verdict:
        """Judge by the loss: at the end it must not be above any told in the steps before."""
        verdict, struck = undone(seen), seen.struck
        losses = [(mark["step"], float(mark["data"]["loss"])) for mark in seen.events("progress")]
        before = [loss for step, loss in losses if struck is not None and step <= struck["step"]]
        after = [loss for _, loss in losses][-LATEST:]
        if not before or len(after) < LATEST:
            return Verdict(verdict.survived, verdict.what)
        end, worst = statistics.median(after), max(before[-2 * LATEST :])
        well = end <= worst
        compared = "not above" if well else "above"
        return Verdict(well, f"{verdict.what}; loss {end:.3g}, {compared} {worst:.3g} before")
