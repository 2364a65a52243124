"""What a run that grows knows of itself: its parts, its counters, and what is told of it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from esper.config import Config
from esper.contracts import Event
from esper.distributed.collectives import Peers, digest
from esper.kasmina.morphable import MorphableModel
from esper.kasmina.race.orchestrator import SeedOrchestrator
from esper.kasmina.race.trial import Germinated, Training
from esper.kasmina.recording.flops import Ledger
from esper.saving.genome import Plan
from esper.surgery.optimizers.clock import Clock
from esper.tamiyo.controller import RemainingBudget, Tamiyo
from esper.tolaria.growth.run.account import Point
from esper.tolaria.growth.run.components import RunComponents
from esper.tolaria.growth.run.mishaps import Mishaps
from esper.tolaria.growth.run.recipe import Recipe, recipe_of


class RunState:
    """The state of one run, which its loop and both recipes read and write.

    Args:
        parts: What the run consists of.
        clock: Counts the steps of its optimizers.

    Attributes:
        peers: The processes that train this model together.
        steps: Optimizer steps acted on.
        events_kept: Events whose growth is in the model.
        batches: The latest of the loop's.
        losses: Since the last progress event.
        topology: Digest of the plans; the same in every process.
        asked: The site the user wants grown, until it has been tried.
        metrics: Of the latest epoch.
    """

    def __init__(self, parts: RunComponents, clock: Clock) -> None:
        self.parts, self.clock = parts, clock
        self.morphable: MorphableModel = parts.model
        self.orchestrator: SeedOrchestrator = parts.orchestrator
        self.tamiyo: Tamiyo = parts.tamiyo
        self.config: Config = parts.config
        self.cost: Ledger = parts.ledger
        self.peers: Peers = parts.wrapping.peers
        self.recipe: Recipe = recipe_of(self.config.growth, self.morphable)
        self.mishaps = Mishaps(self)
        self.begun = time.perf_counter()
        self.batches: deque[object] = deque(maxlen=parts.config.race.batches)
        self.steps = self.events_kept = self.topology = 0
        self.finished = self.paused = False
        self.asked: str | None = None
        self.losses: list[float] = []
        self.metrics: dict[str, float] = {}

    @property
    def plans(self) -> list[Plan]:
        """Everything that grew and changed the model's shape, in order."""
        return self.parts.committer.plans

    def remaining_budget(self) -> RemainingBudget:
        """Return what the budget still allows beside all that is awake."""
        budget, limits, gate = self.parts.budget, self.parts.limits, self.parts.gate
        awake = self.orchestrator.trials.values()
        looks = gate.looks + sum(isinstance(trial, Germinated | Training) for trial in awake)
        spent = (
            looks >= gate.allowed  # a race that may not be judged would only cost
            or (budget.growth_flops is not None and self.cost.growth_flops >= budget.growth_flops)
            or (budget.wall_seconds is not None and self.cost.seconds >= budget.wall_seconds)
            or (budget.latency_ms is not None and self.parts.latency_ms() >= budget.latency_ms)
        )
        most = budget.early_events if self.recipe == "early" else budget.raced_events
        events = 0 if spent else most - self.events_kept - len(awake)
        size, (parameters, flops) = self.morphable.parameter_count(), self.promised()
        left = None if limits.flops is None else limits.flops - self.morphable.flops - flops
        return RemainingBudget(size, limits.parameters - size - parameters, events, left)

    def promised(self) -> tuple[int, int]:
        """Return the parameters and forward FLOPs per example that come if all that is awake is kept."""
        grown = [
            (t.origin.layer.place.site, t.origin.decision.width) for t in self.orchestrator.trials.values()
        ]
        parameters = sum(site.base_parameters + width * site.unit_parameters for site, width in grown)
        return parameters, sum(width * site.unit_flops for site, width in grown)

    @contextmanager
    def reshaping(self) -> Iterator[None]:
        """Change shapes where the governor knows of it: no snapshot outlives the change."""
        yield
        self.orchestrator.guard.reshaped()

    def topology_changed(self) -> None:
        """Digest anew what has grown."""
        self.topology = digest(repr(self.plans))

    def expect(self, why: str, steps: int | None = None) -> None:
        """Announce a discontinuity, such as other data or another learning rate: it is no alarm then.

        Args:
            why: What findings are annotated with.
            steps: How long it may show; None: ``governor.grace``.
        """
        self.orchestrator.guard.expect(self.steps, why, steps)

    def pause(self) -> None:
        """Take no new decision."""
        self.paused = True

    def resume(self) -> None:
        """Decide again."""
        self.paused = False

    def point(self, held_out: float | None) -> Point:
        """Return a point of the curve: the model's size now, and what was spent."""
        spent = self.cost.training_flops + self.cost.growth_flops
        size, flops = self.morphable.parameter_count(), self.morphable.flops
        return Point(self.steps, size, flops, spent, held_out, dict(self.metrics))

    def tell(self, kind: str, **data: object) -> None:
        """Emit an event."""
        self.parts.observe(Event(kind, self.steps, data))
