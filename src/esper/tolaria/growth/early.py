"""The early recipe: a few events, all places at once, inserted at once, judged afterwards.

An event reads training and held-out examples once each, forth and back, and asks at every place whether new
units would lower the loss of examples nobody has learned from. Places that pass are widened together by a
factor of two under the budget; nothing the model says changes at that moment. A saturated host is re-opened.
A while later the held-out loss must have fallen, or the event is taken back.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.contracts import Decision, Event, Outcome, Stage
from esper.errors import SurgeryError
from esper.kasmina.evidence import count_examples, join
from esper.kasmina.growth_cost import growth_cost
from esper.kasmina.isolation import evaluating, untouched
from esper.kasmina.lessons import first
from esper.kasmina.places import Place, WidenPlace
from esper.kasmina.reopen import SATURATED, TEMPER, guess, multiply, output_layers, tempered
from esper.kasmina.score import Score, Scored
from esper.tamiyo.early import allocate, due, wanted
from esper.tamiyo.triggers import Trigger
from esper.tolaria.growth.commit import FAILURES
from esper.tolaria.growth.rates import forecast
from esper.tolaria.growth.takeback import Before

RECENT = 20  # losses of the latest steps that a saturated host is told by


@dataclass
class Judged:
    """An event whose worth is still open."""

    before: Before
    until: int
    loss: float  # held out, before the event
    grown: list[tuple[Decision, int, int]]  # decision, seed, units
    outcomes: list[Outcome] = field(default_factory=list)


class Early:
    """Grows one run early.

    Args:
        growth: The conductor.
    """

    def __init__(self, growth: Any) -> None:
        self.growth, self.parts = growth, growth.parts
        self.settings = growth.config.early
        self.open: Judged | None = None
        self.events = 0
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.batches: deque[Any] = deque()
        self.trigger = Trigger(growth.config.schedule, None, 0) if self.parts.steps is None else None
        self.due = self.plan()
        self.outputs = self.find_outputs()
        self.guess: float | None = None
        self.guessed = False
        self.log: list[dict[str, Any]] = []

    # -- when ------------------------------------------------------------------------------------------------

    def plan(self) -> list[int]:
        """Place the events that are still to come by what the learning rate will do."""
        steps = self.parts.steps
        if steps is None:
            return []
        optimizer = next(iter(self.parts.optimizers.values()))
        rates = forecast(self.parts.schedulers, optimizer, steps, self.growth.steps)
        return [s for s in due(self.settings.shares, rates, steps) if s > self.growth.steps]

    @property
    def growing(self) -> bool:
        """Whether anything may still grow."""
        return self.open is not None or bool(self.due) or self.trigger is not None

    def step(self, loss: float) -> None:
        """Do what one optimizer step asks for."""
        growth = self.growth
        self.losses.append(loss)
        self.collect()
        if self.open is not None and growth.steps >= self.open.until:
            self.judge()
        why = self.reason(loss)
        if why is not None and not growth.paused:
            self.event(why)

    def reason(self, loss: float) -> str | None:
        """Return why an event is due, or None."""
        growth = self.growth
        if growth.asked is not None:
            return "asked for"
        if self.trigger is not None:
            return self.trigger.reason(growth.steps, loss)
        now = growth.steps
        if self.due and now & (now - 1) == 0 and now < self.due[0] and not self.events:
            self.due = self.plan() or self.due  # how often the schedulers move shows only by and by
        if self.due and now >= self.due[0]:
            self.due = [s for s in self.due if s > now]
            return "scheduled"
        return None

    def collect(self) -> None:
        """Keep recent batches while an event is near: as many as it will read."""
        latest = self.growth.batches[-1]
        size = max(count_examples(latest), 1)
        near = self.trigger is not None or (
            bool(self.due) and self.due[0] - self.growth.steps <= self.settings.examples // size + 1
        )
        if not near:
            self.batches.clear()
        self.batches.append(latest)
        while len(self.batches) > 1 and (len(self.batches) - 1) * size >= self.settings.examples:
            self.batches.popleft()

    # -- what ------------------------------------------------------------------------------------------------

    def find_outputs(self) -> list[torch.nn.Module]:
        """Find the output layer."""
        host = self.growth.morphable.host
        batch = self.probe()[0]
        with self.growth.morphable.policy.uncompiled(), evaluating(host), untouched(host, 0):
            return output_layers(host, lambda: self.parts.run(first(batch, 2)))

    def probe(self) -> list[Any]:
        """Return the held-out examples an event reads."""
        with untouched(self.growth.morphable.host):
            batches, count = [], 0
            for batch in self.parts.probe:
                batches.append(batch)
                count += count_examples(batch)
                if count >= self.settings.examples:
                    break
        return [first(batch, self.settings.examples) for batch in join(batches)]

    def held_out(self, batches: Sequence[Any]) -> float:
        """Return the mean held-out loss."""
        host = self.growth.morphable.host
        total = examples = 0.0
        with evaluating(host), untouched(host, 0):
            for batch in batches:
                count = count_examples(batch)
                total += float(self.parts.run(batch)) * count
                examples += count
        return total / examples

    def event(self, why: str) -> None:
        """Look at every place, and grow those that pass."""
        growth, parts = self.growth, self.parts
        if self.open is not None:
            self.judge()
        only, growth.asked = growth.asked, None
        room = growth._room()
        free = {
            n: p
            for n, p in growth.morphable.places.items()
            if isinstance(p, WidenPlace) and only in (None, n) and not growth.orchestrator.embargoed(n)
        }
        sites = [place.site for place in free.values()]
        cost = lambda units: growth_cost(growth.morphable.host, free, units)  # noqa: E731
        units = allocate(sites, self.settings.factor, room, cost) if room.events > 0 else {}
        if not units:
            self.due = []
            return
        self.events += 1
        held = self.probe()
        with growth.cost.growth("event", growth.steps):
            scored, loss, training = self.score(free, units, held)
        passed = self.passing(scored)
        entry: dict[str, Any] = {
            "step": growth.steps, "held": loss, "train": training, "guess": self.guess,
            "sites": {n: (z(s.values), s.gain) for n, s in scored.items()}, "passed": sorted(passed),
        }
        self.log.append(entry)
        final = allocate([free[n].site for n in passed], self.settings.factor, room, cost)
        if not final:
            return
        self.insert(why, {n: scored[n] for n in final}, final, loss)
        entry["reopened"] = self.reopen(training)

    def score(
        self, free: Mapping[str, Place], units: Mapping[str, int], held: Sequence[Any]
    ) -> tuple[dict[str, Scored], float, float]:
        """Measure every place."""
        host, parts = self.growth.morphable.host, self.parts
        seed = parts.streams.draw("evidence")
        if not self.guessed:
            with evaluating(host), untouched(host, 0):
                self.guess = guess(self.outputs, lambda: parts.run(held[0]))
            self.guessed = True
        score = Score(host, {n: free[n] for n in units}, units, self.growth.peers)
        factor = TEMPER if self.guess is not None else 1.0
        with tempered(self.outputs, factor):
            score.fit(self.runs(join(self.batches)), seed)
            score.test(self.runs(held), True, seed)
        return score.chosen, self.held_out(held), float(np.mean(self.losses))

    def runs(self, batches: Sequence[Any]) -> list[tuple[Callable[[], Tensor], int]]:
        """Return passes over batches, with their examples."""
        few = [first(batch, self.settings.examples) for batch in batches]
        return [((lambda b=batch: self.parts.run(b)), count_examples(batch)) for batch in few]

    def passing(self, scored: Mapping[str, Scored]) -> list[str]:
        """Return the places with held-out evidence."""
        return [name for name, one in scored.items() if len(one.values) and z(one.values) > 4.0]

    # -- how -------------------------------------------------------------------------------------------------

    def insert(self, why: str, scored: Mapping[str, Scored], units: Mapping[str, int], loss: float) -> None:
        """Widen every place that passed."""
        growth, parts = self.growth, self.parts
        models = [growth.morphable.host, *parts.averages]
        before = Before.of(models, parts.optimizers, growth.steps, len(growth.plans))
        for name in reversed(list(units)):  # consumers first: rows that are new may read what is there
            place = growth.morphable.places[name]
            kernel = fitted(place, scored[name].kernel, units[name])
            import os
            if os.environ.get("X_OUT") == "random":
                with torch.no_grad():
                    w = kernel.consumer_weight; old = place.consumer.weight
                    fan = old[0].numel() + w[0].numel()
                    w.uniform_(-(fan ** -0.5), fan ** -0.5)
            plan = kernel.plan()
            before.note(growth.morphable.host, plan)
            parts.committer.carry_out(plan, kernel.slices(plan), {}, None, growth.steps)
            growth.plans.append(plan)
            growth.morphable.refresh(parts.committer.run)
        growth.morphable.meter(parts.committer.run)
        growth.events_kept += 1
        until = growth.steps + max(round(self.settings.judge * (parts.steps or 1000)), 1)
        self.open = Judged(before, until, loss, [])

    def reopen(self, training: float) -> str:
        """Re-open a saturated host."""
        how = self.settings.reopen
        if how == "auto":
            saturated = self.guess is not None and training < SATURATED * self.guess
            how = "output" if saturated else "no"
        if how == "output" and self.guess is not None:
            multiply(self.outputs, TEMPER)
        elif how == "shrink":
            with torch.no_grad():
                for p in self.growth.morphable.host.parameters():
                    p.mul_(float(__import__("os").environ.get("X_SHR","0.4")))
            for optimizer in self.parts.optimizers.values():
                for state in optimizer.state.values():
                    for value in state.values():
                        if isinstance(value, Tensor):
                            value.zero_()
        return how

    def judge(self) -> None:
        """Keep the event, or take it back."""
        judged, self.open = self.open, None
        assert judged is not None
        now = self.held_out(self.probe())
        self.log.append({"judged": self.growth.steps, "before": judged.loss, "now": now})
        if now < judged.loss:
            return
        models = [self.growth.morphable.host, *self.parts.averages]
        judged.before.restore(models, self.parts.optimizers)
        del self.growth.plans[judged.before.plans :]
        self.growth.morphable.refresh(self.parts.committer.run)
        self.growth.morphable.meter(self.parts.committer.run)
        self.growth.events_kept -= 1


def z(values: np.ndarray) -> float:
    """Return mean over standard error."""
    return float(values.mean() / (values.std(ddof=1) / len(values) ** 0.5 + 1e-30))


def fitted(place: Any, given: Any, units: int) -> Any:
    """Build a kernel of the place's present shapes from one of shapes before its neighbours grew."""
    kernel = place.kernel(units)
    tensors = {**dict(given.named_parameters()), **dict(given.named_buffers())}
    with torch.no_grad():
        for name, own in (*kernel.named_parameters(), *kernel.named_buffers()):
            old = tensors[name]
            if name in kernel.outgoing:
                continue
            own.zero_()
            window = tuple(slice(0, min(a, b)) for a, b in zip(own.shape, old.shape, strict=True))
            own[window] = old[window]
    return kernel
