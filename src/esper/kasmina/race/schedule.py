"""How long stages last, and how much of the training a race looks at.

It looks at every batch where steps are cheap, and at samples where they are dear.
Eight candidates that learn from whole batches cost a large host a third of its training (docs/decisions.md).
What a step costs is counted in FLOPs, not read from a clock, so a run takes the same way on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from esper.batches.examples import split_batch
from esper.batches.layout import Batch, part, unflatten
from esper.config import Config
from esper.config import Race as RaceSettings
from esper.contracts import Site
from esper.kasmina.race.initialisers import STARTS

LARGE = 5e8  # FLOPs of a training step, forward and backward; 15 to 30 ms on one core
SHARE = 0.03  # of the training beside it: what the lessons of either kind may cost a race there
LEAST = 8  # examples in a lesson
ENOUGH = 16  # lessons behind the real loss; rather fewer examples in each than fewer of them
RHYTHM = 3  # steps from one tapped gradient to the next: a lesson of any size costs 1 to 2 ms of Python
FIELD = 4  # candidates


@dataclass(frozen=True, slots=True)
class Timing:
    """How many steps each stage lasts."""

    incubate: int
    ramp: int
    stabilise: int
    evaluate: int
    embargo: int

    @classmethod
    def of(cls, config: Config, steps: int | None, settling: int) -> Timing:
        """Derive from the run's length what the settings leave open.

        Args:
            config: Settings of the run.
            steps: Optimizer steps of the run; None counts as 1,000.
            settling: Steps the host's running statistics need to settle (0 without BatchNorm).
        """
        length = steps or 1000
        ramp = config.blend.ramp or min(max(length // 250, 4), 100)
        stabilise = config.blend.stabilise if config.blend.stabilise is not None else max(ramp // 2, settling)
        return cls(
            incubate=config.race.steps or min(max(length // 16, 8), 200),
            ramp=ramp,
            stabilise=stabilise,
            evaluate=config.blend.evaluate or ramp,
            embargo=math.ceil(config.schedule.embargo * length),
        )


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a training step of the host costs."""

    flops: int  # forward, per example
    examples: int

    def large(self, settings: RaceSettings) -> bool:
        """Tell whether races only sample the training; not where the user said how often they learn."""
        return settings.shadow_every is None and 3 * self.flops * self.examples >= LARGE


@dataclass(frozen=True, slots=True)
class RaceSchedule:
    """The plan of one race."""

    every: int  # steps from one lesson behind the real loss to the next
    examples: int | None  # read in each; None: whole batches
    rhythm: int  # steps from one lesson on the tapped gradient to the next, in those left free; 0: none
    tapped: int | None  # examples read there; None: all
    halvings: Set[int]  # steps after which the worse half drops out

    @classmethod
    def of(cls, settings: RaceSettings, steps: int, step: StepCost, site: Site, units: int) -> RaceSchedule:
        """Plan a race.

        Args:
            settings: Settings of races.
            steps: Length of the race, in training steps.
            step: Costs of the host's training step.
            site: Site of the race.
            units: Units of every candidate.
        """
        if not step.large(settings):
            halvings = {max(steps // 16, 1), steps // 8, steps // 4}
            return cls(
                settings.shadow_every or 1, None, int(settings.shadow_every is not None), None, halvings
            )
        allowed = SHARE * steps * 3 * step.flops * step.examples
        # Per example and candidate: the kernel with its weights, and behind the real loss the rest of the
        # host, forward and back at most. The tapped gradient of a late site is nearly free.
        kernel = 3 * units * site.unit_flops
        price = 2 * step.flops + kernel
        examples = max(min(int(allowed / price / ENOUGH), step.examples // 4), LEAST)
        count = int(allowed / price / examples) - FIELD  # four in the first lesson, two in the next, then one
        every = max(steps // max(count, 1), 1)
        tapped = min(int(allowed * RHYTHM / kernel / (steps + FIELD * every)), step.examples)
        return cls(every, examples, RHYTHM if tapped >= LEAST else 0, tapped, {every, 2 * every})

    def kind(self, age: int) -> Literal["shadow", "tap", "none"]:
        """Tell what a race learns from at its ``age``-th step."""
        if age % self.every == 0:
            return "shadow"
        return "tap" if self.rhythm and age % self.rhythm == 0 else "none"


def first(batch: Batch, examples: int | None) -> Batch:
    """Return a batch of the first examples, which are in random order anyway; None: all of them."""
    if examples is None:
        return batch
    leaves, batched, nest, _ = split_batch(batch)
    few = [part(leaf, slice(examples)) if many else leaf for leaf, many in zip(leaves, batched, strict=True)]
    return unflatten(few, nest)


def lined_up(settings: RaceSettings, step: StepCost, start: str) -> tuple[str, ...]:
    """Return where each candidate of a race starts; fewer of them where the host's step is dear.

    Args:
        settings: Settings of races.
        step: The host's step, its forward FLOPs and examples.
        start: Mix of starts, a key of ``STARTS``.
    """
    count = min(settings.candidates, FIELD) if step.large(settings) else settings.candidates
    sown = math.ceil(count * STARTS[start])
    return ("svd",) * sown + ("random",) * (count - sown)
